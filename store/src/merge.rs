//! One page out of several ordered sources, of which earlier ones mask later ones.

use std::iter::Peekable;

use anabranch_core::store::StoreError;

/// A key and what a source knows of it: a value, or that it is absent.
pub(crate) type Known<K, V> = Result<(K, Option<V>), StoreError>;

/// An ordered source of keys; all sources of one merge run in the same direction.
pub(crate) type Source<'a, K, V> = Peekable<Box<dyn Iterator<Item = Known<K, V>> + 'a>>;

/// Makes a source of an iterator.
pub(crate) fn source<'a, K, V>(entries: impl Iterator<Item = Known<K, V>> + 'a) -> Source<'a, K, V> {
    let boxed: Box<dyn Iterator<Item = Known<K, V>> + 'a> = Box::new(entries);
    boxed.peekable()
}

/// The first `limit` present keys of all sources. Where several know a key, the first
/// source in the list is right.
pub(crate) fn merge_page<K: Ord, V>(
    mut sources: Vec<Source<'_, K, V>>,
    descending: bool,
    limit: usize,
) -> Result<Vec<(K, V)>, StoreError> {
    let mut page = Vec::new();
    while page.len() < limit {
        let mut best: Option<(usize, &K)> = None;
        for (i, source) in sources.iter_mut().enumerate() {
            match source.peek() {
                None => {}
                Some(Err(e)) => return Err(e.clone()),
                Some(Ok((key, _))) => {
                    let closer = match best {
                        None => true,
                        Some((_, best)) if descending => key > best,
                        Some((_, best)) => key < best,
                    };
                    if closer {
                        best = Some((i, key));
                    }
                }
            }
        }
        let Some((winner, _)) = best else { break };
        let Some((key, value)) = sources[winner].next().transpose()? else { break };
        for source in sources.iter_mut().skip(winner + 1) {
            source.next_if(|entry| matches!(entry, Ok((other, _)) if *other == key));
        }
        if let Some(value) = value {
            page.push((key, value));
        }
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[(u8, Option<u8>)]) -> Source<'_, u8, u8> {
        source(entries.iter().copied().map(Ok))
    }

    #[test]
    fn earlier_sources_mask_later_ones_in_both_directions() {
        let top = [(2, None), (3, Some(30)), (9, Some(90))];
        let base = [(1, Some(1)), (2, Some(2)), (3, Some(3)), (4, Some(4))];
        let page = merge_page(vec![list(&top), list(&base)], false, 9).unwrap();
        assert_eq!(page, [(1, 1), (3, 30), (4, 4), (9, 90)]);
        let (mut top, mut base) = (top, base);
        top.reverse();
        base.reverse();
        let page = merge_page(vec![list(&top), list(&base)], true, 3).unwrap();
        assert_eq!(page, [(9, 90), (4, 4), (3, 30)]);
    }
}
