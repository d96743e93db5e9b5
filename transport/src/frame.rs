//! Frames on a QUIC stream: `[length: u32 little endian][flags: u8][payload]`.

use crate::{connection::Shared, error::TransportError};
use bytes::Bytes;
use std::{mem, sync::Arc};

/// The most a receiver takes in one frame until its application raises the limit: 64 KiB.
pub const FRAME_BYTES_MAX_BEFORE_SIGN_IN: usize = 64 * 1024;

/// The most a frame can ever have: 64 MiB. Both [`FrameSender::send`] and
/// [`FrameReceiver::raise_limit`] stop here.
pub const FRAME_BYTES_MAX: usize = 64 * 1024 * 1024;

const HEADER_BYTES: usize = 5;

/// First allocation for a payload. Beyond it memory grows with what has arrived, never with what
/// was announced.
const FIRST_ALLOCATION_BYTES: usize = 4 * 1024;

/// The sending half of a control stream.
///
/// Dropping it without [`finish`](Self::finish) tells the peer that no more comes, and leaves it
/// open whether the last frames arrive.
#[derive(Debug)]
pub struct FrameSender {
    stream: quinn::SendStream,
    /// What is left to send of the frame that was begun last. Invariant: a frame that was begun
    /// is sent to its end before another one, or the peer would take one for the other's middle.
    pending: Vec<Bytes>,
    finished: bool,
    _shared: Arc<Shared>,
}

impl FrameSender {
    pub(crate) fn new(stream: quinn::SendStream, shared: Arc<Shared>) -> Self {
        Self { stream, pending: Vec::new(), finished: false, _shared: shared }
    }

    /// Sends one frame; waits while the peer or the network can't take more.
    ///
    /// When this returns, the frame is handed to QUIC in whole, which repeats it until the peer
    /// has it or the connection ends. It is no word from the peer's application.
    ///
    /// # Errors
    /// [`TransportError::OversizedSend`] over [`FRAME_BYTES_MAX`], [`TransportError::Closed`] after
    /// [`finish`](Self::finish), else what became of the connection.
    ///
    /// # Cancellation
    /// If the future is dropped, the frame was either not begun, or its rest goes out with the next
    /// [`send`](Self::send) or [`finish`](Self::finish).
    pub async fn send(&mut self, frame: Vec<u8>) -> Result<(), TransportError> {
        if self.finished {
            return Err(TransportError::Closed);
        }
        let oversized =
            || TransportError::OversizedSend { bytes: frame.len() as u64, max_bytes: FRAME_BYTES_MAX as u64 };
        if frame.len() > FRAME_BYTES_MAX {
            return Err(oversized());
        }
        let length = u32::try_from(frame.len()).map_err(|_| oversized())?;
        self.flush().await?;
        let mut header = length.to_le_bytes().to_vec();
        header.push(0);
        self.pending = vec![Bytes::from(header), Bytes::from(frame)];
        self.flush().await
    }

    /// Ends the stream gracefully: waits until the peer has received every frame.
    ///
    /// Call it before [`Connection::close`](crate::Connection::close), which throws away what is
    /// on its way. When this returns, the peer's system has the frames; its application may not
    /// have read them.
    ///
    /// # Errors
    /// What became of the connection, if it ended first.
    ///
    /// # Cancellation
    /// If the future is dropped, call it again to go on waiting.
    pub async fn finish(&mut self) -> Result<(), TransportError> {
        self.flush().await?;
        if !self.finished {
            self.finished = true;
            // It fails only if the peer stopped reading, which the next line tells.
            let _ = self.stream.finish();
        }
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(stopped(code)),
            Err(quinn::StoppedError::ConnectionLost(error)) => Err(TransportError::from_connection(error)),
            Err(quinn::StoppedError::ZeroRttRejected) => Err(TransportError::Closed),
        }
    }

    async fn flush(&mut self) -> Result<(), TransportError> {
        while !self.pending.is_empty() {
            // Safe to drop while it waits: it shortens `pending` exactly by what it took.
            self.stream.write_chunks(&mut self.pending).await.map_err(|error| match error {
                quinn::WriteError::ConnectionLost(error) => TransportError::from_connection(error),
                quinn::WriteError::Stopped(code) => stopped(code),
                quinn::WriteError::ClosedStream | quinn::WriteError::ZeroRttRejected => {
                    TransportError::Closed
                }
            })?;
            self.pending.retain(|chunk| !chunk.is_empty());
        }
        Ok(())
    }

    /// Sends bytes that need not be frames.
    #[cfg(test)]
    pub(crate) async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }
}

fn stopped(code: quinn::VarInt) -> TransportError {
    TransportError::Refused { code: code.into_inner(), reason: "it stopped reading".into() }
}

/// The receiving half of a control stream.
///
/// Dropping it tells the peer that nothing more is read.
#[derive(Debug)]
pub struct FrameReceiver {
    stream: quinn::RecvStream,
    decoder: FrameDecoder,
    /// A frame without payload was announced, whose header was all of it.
    empty: bool,
    shared: Arc<Shared>,
}

impl FrameReceiver {
    pub(crate) fn new(stream: quinn::RecvStream, shared: Arc<Shared>) -> Self {
        Self { stream, decoder: FrameDecoder::new(FRAME_BYTES_MAX_BEFORE_SIGN_IN), empty: false, shared }
    }

    /// How long the next frame's payload will be, or `None` when the peer has finished the stream.
    ///
    /// Nothing of the payload is taken from the network before [`next`](Self::next) is called, so an
    /// application that has no room for it yet has the peer wait.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    ///
    /// # Cancellation
    /// If the future is dropped, nothing is lost.
    pub async fn announced(&mut self) -> Result<Option<usize>, TransportError> {
        loop {
            if let Some(bytes) = self.empty.then_some(0).or(self.decoder.announced()) {
                return Ok(Some(bytes));
            }
            match self.read().await? {
                Some(Some(_)) => self.empty = true,
                Some(None) => {}
                None => return Ok(None),
            }
        }
    }

    /// How many bytes of the next frame's payload have been taken from the network so far, if it is not
    /// complete.
    pub fn arrived(&self) -> usize {
        self.decoder.arrived()
    }

    /// The next frame, or `None` when the peer has finished the stream.
    ///
    /// A frame's length is checked before anything is allocated for it, and memory grows with what
    /// has arrived. A peer that is not read from is held back by QUIC's flow control.
    ///
    /// # Errors
    /// [`TransportError::FrameTooLarge`] and [`TransportError::BadFrame`] if the peer broke the
    /// rules, also if it ended the stream within a frame; every later call then fails in the same
    /// way. Else what became of the connection.
    ///
    /// # Cancellation
    /// If the future is dropped, nothing is lost: the next call goes on in the middle of the frame.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, TransportError> {
        if std::mem::take(&mut self.empty) {
            return Ok(Some(Vec::new()));
        }
        loop {
            match self.read().await? {
                Some(None) => {}
                Some(frame) => return Ok(frame),
                None => return Ok(None),
            }
        }
    }

    /// Takes what comes next; returns the frame if it completes one. `None` is the stream's end.
    async fn read(&mut self) -> Result<Option<Option<Vec<u8>>>, TransportError> {
        let wanted = self.decoder.wanted()?;
        let chunk = match self.stream.read_chunk(wanted, true).await {
            Ok(chunk) => chunk,
            Err(quinn::ReadError::ConnectionLost(error)) => {
                return Err(TransportError::from_connection(error));
            }
            Err(quinn::ReadError::Reset(code)) => {
                return Err(self.decoder.fail(format!("it gave up the stream with code {code}")));
            }
            Err(
                quinn::ReadError::ClosedStream
                | quinn::ReadError::IllegalOrderedRead
                | quinn::ReadError::ZeroRttRejected,
            ) => return Err(TransportError::Closed),
        };
        match chunk {
            Some(chunk) => Ok(Some(self.decoder.push(&chunk.bytes)?)),
            None if self.decoder.is_between_frames() => Ok(None),
            None => Err(self.decoder.fail("the stream ended within a frame")),
        }
    }

    /// Raises the limit of a frame's payload to `bytes`, at most [`FRAME_BYTES_MAX`], and lets the
    /// peer have more data in flight on this connection; to be called once the peer has signed in.
    ///
    /// It holds for frames whose header has not been read yet. A lower limit than the one in force
    /// is ignored.
    pub fn raise_limit(&mut self, bytes: usize) {
        self.decoder.max_bytes = self.decoder.max_bytes.max(bytes.min(FRAME_BYTES_MAX));
        self.shared.widen_window();
    }
}

/// Turns bytes, cut anywhere, into frames. No IO, and all state of a half-read frame.
///
/// [`FrameReceiver`] is this over a QUIC stream.
#[derive(Debug)]
pub struct FrameDecoder {
    max_bytes: usize,
    state: State,
}

#[derive(Debug)]
enum State {
    Header {
        bytes: [u8; HEADER_BYTES],
        filled: usize,
    },
    /// Invariant: `payload` is shorter than `length`.
    Payload {
        payload: Vec<u8>,
        length: usize,
    },
    /// A rule was broken: where the next frame starts is not known any more.
    Failed(TransportError),
}

const START: State = State::Header { bytes: [0; HEADER_BYTES], filled: 0 };

impl FrameDecoder {
    /// A decoder that refuses payloads over `max_bytes`.
    pub fn new(max_bytes: usize) -> Self {
        Self { max_bytes, state: START }
    }

    /// How many bytes [`push`](Self::push) takes at most; at least one.
    ///
    /// # Errors
    /// The rule that the peer broke earlier.
    pub fn wanted(&self) -> Result<usize, TransportError> {
        match &self.state {
            State::Header { filled, .. } => Ok(HEADER_BYTES - filled),
            State::Payload { payload, length } => Ok(length - payload.len()),
            State::Failed(error) => Err(error.clone()),
        }
    }

    /// How long the payload is whose header was read, while it is not complete.
    pub fn announced(&self) -> Option<usize> {
        match &self.state {
            State::Payload { length, .. } => Some(*length),
            State::Header { .. } | State::Failed(_) => None,
        }
    }

    /// How much of that payload is here.
    pub fn arrived(&self) -> usize {
        match &self.state {
            State::Payload { payload, .. } => payload.len(),
            State::Header { .. } | State::Failed(_) => 0,
        }
    }

    /// Whether a stream may end here.
    pub fn is_between_frames(&self) -> bool {
        matches!(self.state, State::Header { filled: 0, .. })
    }

    /// Takes at most as many bytes as were [`wanted`](Self::wanted); returns the frame that they
    /// complete.
    ///
    /// # Errors
    /// [`TransportError::FrameTooLarge`] and [`TransportError::BadFrame`]: from then on every call
    /// fails.
    pub fn push(&mut self, input: &[u8]) -> Result<Option<Vec<u8>>, TransportError> {
        debug_assert!(self.wanted().is_err() || self.wanted().is_ok_and(|wanted| input.len() <= wanted));
        match &mut self.state {
            State::Header { bytes, filled } => {
                for (to, from) in bytes.iter_mut().skip(*filled).zip(input) {
                    *to = *from;
                    *filled += 1;
                }
                if *filled < HEADER_BYTES {
                    return Ok(None);
                }
                let [a, b, c, d, flags] = *bytes;
                let length = u32::from_le_bytes([a, b, c, d]);
                if flags != 0 {
                    return Err(self.fail(format!("its flags are {flags:#04x}, but none are known")));
                }
                match usize::try_from(length) {
                    Ok(0) => {
                        self.state = START;
                        Ok(Some(Vec::new()))
                    }
                    Ok(length) if length <= self.max_bytes => {
                        let payload = Vec::with_capacity(length.min(FIRST_ALLOCATION_BYTES));
                        self.state = State::Payload { payload, length };
                        Ok(None)
                    }
                    _ => {
                        let max_bytes = self.max_bytes as u64;
                        let error = TransportError::FrameTooLarge { bytes: length.into(), max_bytes };
                        self.state = State::Failed(error.clone());
                        Err(error)
                    }
                }
            }
            State::Payload { payload, length } => {
                payload.extend_from_slice(input);
                if payload.len() < *length {
                    return Ok(None);
                }
                let payload = mem::take(payload);
                self.state = START;
                Ok(Some(payload))
            }
            State::Failed(error) => Err(error.clone()),
        }
    }

    fn fail(&mut self, detail: impl Into<String>) -> TransportError {
        let error = TransportError::bad_frame(detail);
        self.state = State::Failed(error.clone());
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(payload.len()).unwrap().to_le_bytes().to_vec();
        bytes.push(0);
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Feeds `input` as a stream would: never more than wanted.
    fn feed(decoder: &mut FrameDecoder, mut input: &[u8]) -> Result<Vec<Vec<u8>>, TransportError> {
        let mut frames = Vec::new();
        while !input.is_empty() {
            let (now, later) = input.split_at(decoder.wanted()?.min(input.len()));
            frames.extend(decoder.push(now)?);
            input = later;
        }
        Ok(frames)
    }

    #[test]
    fn frames_cut_at_every_byte_come_out_whole() {
        let bytes = [frame(b"first"), frame(b""), frame(&[7; 300])].concat();
        let whole = vec![b"first".to_vec(), Vec::new(), vec![7; 300]];
        for cut in 0..=bytes.len() {
            let mut decoder = FrameDecoder::new(1024);
            let mut frames = feed(&mut decoder, &bytes[..cut]).unwrap();
            frames.extend(feed(&mut decoder, &bytes[cut..]).unwrap());
            assert_eq!(frames, whole, "cut at {cut}");
            assert!(decoder.is_between_frames());
        }
        let mut decoder = FrameDecoder::new(1024);
        let frames: Vec<_> = bytes.chunks(1).flat_map(|byte| feed(&mut decoder, byte).unwrap()).collect();
        assert_eq!(frames, whole);
    }

    #[test]
    fn what_has_arrived_of_a_frame_is_told_until_it_is_complete() {
        let mut decoder = FrameDecoder::new(1024);
        let arrived: Vec<usize> = frame(b"abc")
            .iter()
            .map(|byte| {
                decoder.push(&[*byte]).unwrap();
                decoder.arrived()
            })
            .collect();
        assert_eq!(arrived, [0, 0, 0, 0, 0, 1, 2, 0]);
    }

    #[test]
    fn the_limit_is_exact_and_stays_broken() {
        let mut decoder = FrameDecoder::new(3);
        assert_eq!(feed(&mut decoder, &frame(b"abc")).unwrap(), [b"abc"]);
        for _ in 0..2 {
            let error = feed(&mut decoder, &frame(b"abcd")).unwrap_err();
            assert!(matches!(error, TransportError::FrameTooLarge { bytes: 4, max_bytes: 3 }), "{error}");
        }
    }

    #[test]
    fn an_announced_length_allocates_next_to_nothing() {
        let mut decoder = FrameDecoder::new(FRAME_BYTES_MAX);
        let header = [&u32::try_from(FRAME_BYTES_MAX).unwrap().to_le_bytes()[..], &[0, 1]].concat();
        feed(&mut decoder, &header).unwrap();
        let State::Payload { payload, .. } = &decoder.state else { panic!("a payload is due") };
        assert!(payload.capacity() <= 2 * FIRST_ALLOCATION_BYTES);
    }

    #[test]
    fn any_flag_is_refused() {
        for bit in 0..8 {
            let mut decoder = FrameDecoder::new(3);
            let error = feed(&mut decoder, &[1, 0, 0, 0, 1 << bit, 9]).unwrap_err();
            assert!(matches!(error, TransportError::BadFrame { .. }) && error.is_peer_fault());
        }
    }
}
