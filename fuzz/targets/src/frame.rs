//! Frames, cut anywhere.

use anabranch_transport::{FRAME_BYTES_MAX_BEFORE_SIGN_IN, FrameDecoder};

use crate::Draw;

/// The frames in a stream that comes in pieces of these sizes, and whether it was in order.
fn frames(stream: &[u8], mut piece: impl FnMut() -> usize) -> (Vec<Vec<u8>>, bool) {
    let mut decoder = FrameDecoder::new(FRAME_BYTES_MAX_BEFORE_SIGN_IN);
    let (mut frames, mut rest) = (Vec::new(), stream);
    while !rest.is_empty() {
        let Ok(wanted) = decoder.wanted() else { return (frames, false) };
        assert!(wanted > 0, "a decoder that wants nothing never ends");
        let (taken, left) = rest.split_at(piece().clamp(1, wanted).min(rest.len()));
        rest = left;
        match decoder.push(taken) {
            Ok(Some(frame)) => {
                assert!(frame.len() <= FRAME_BYTES_MAX_BEFORE_SIGN_IN, "a frame above the limit");
                frames.push(frame);
            }
            Ok(None) => {}
            Err(_) => {
                assert!(decoder.wanted().is_err(), "a broken stream goes on");
                return (frames, false);
            }
        }
    }
    (frames, decoder.is_between_frames())
}

pub(crate) fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    let sizes = draw.take(8).to_vec();
    let stream = draw.rest();
    let whole = frames(stream, || usize::MAX);
    let mut turn = 0;
    let cut = frames(stream, || {
        turn += 1;
        usize::from(sizes.get(turn % 8).copied().unwrap_or(1))
    });
    assert_eq!(whole, cut, "where a stream is cut changes what is in it");
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let frame =
        |length: u32, flags: u8, payload: &[u8]| [&length.to_le_bytes()[..], &[flags], payload].concat();
    [
        frame(3, 0, b"abc"),
        [frame(0, 0, b""), frame(1, 0, b"x"), frame(5000, 0, &[7; 5000])].concat(),
        frame(3, 1, b"abc"),
        frame(u32::MAX, 0, b"abc"),
        frame(65_537, 0, b""),
        frame(9, 0, b"cut"),
        Vec::new(),
    ]
    .map(|stream| [&[1, 2, 3, 5, 8, 13, 21, 255][..], &stream].concat())
    .into()
}
