//! What a look at everything finds.

use anabranch_core::relay::verify;
use anabranch_core::store::{Batch, Keyspace, Store as _, View};

use crate::support::*;

#[test]
fn what_is_missing_from_a_store_is_found() {
    let look = |world: &World| verify(&*world.store, &home(), &mut |_| ()).unwrap().unwrap();
    for keyspace in [Keyspace::FEED, Keyspace::ENTITY, Keyspace::HEADER] {
        let mut world = World::with_schema();
        let mut ann = Device::new(1);
        let conn = world.join(&ann, "writer");
        for id in ["a", "b", "c"] {
            let (first, second) = (ann.edit(id), ann.edit(id));
            world.submit(conn, unit([of(id, &[&first, &second])]));
        }
        let checked = look(&world);
        assert_eq!((checked.entities, checked.faults), (3, vec![]));
        assert!(checked.feed_entries >= 3);
        let page = world.store.scan(View::Latest, keyspace, &[], &[], 100).unwrap();
        let (place, _) = page.last().unwrap();
        let mut batch = Batch::new();
        batch.delete(keyspace, place.clone());
        world.store.commit(batch).unwrap();
        assert!(!look(&world).faults.is_empty(), "{keyspace:?}");
    }
}
