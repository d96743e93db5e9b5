//! redb 4 as a backend: one table, one durable write transaction for each group.
//!
//! A read transaction sees the newest committed state. redb shows a commit to readers only
//! after it has synced the file, so that what they see is durable.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use anabranch_core::store::StoreError;
use redb::{
    AccessGuard, CommitError, CompactionError, Database, DatabaseError, Durability, ReadOnlyTable,
    ReadableDatabase, ReadableTable, StorageError, TableDefinition, TableError, TransactionError,
};

use super::{Backend, Bytes, Change, Entries, Reader, Visit, file_error};
use crate::files::{io_error, sync_dir};
use crate::keys::KeyRange;
use crate::options::StoreOptions;

/// The database in a store's directory.
pub(crate) const FILE: &str = "data.redb";
const TABLE: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("entries");

/// See the [module](self).
pub(crate) struct Redb {
    /// Locked for writing only while it is verified, which redb allows nobody else to watch.
    db: RwLock<Database>,
    path: PathBuf,
}

impl Redb {
    pub(crate) fn open(dir: &Path, options: &StoreOptions) -> Result<Redb, StoreError> {
        let path = dir.join(FILE);
        if !path.exists() {
            create(dir, &path)?;
        }
        let mut builder = Database::builder();
        builder.set_cache_size(usize::try_from(options.cache_bytes).unwrap_or(usize::MAX));
        // redb trusts the pages of a file that was closed properly: one branch that was changed
        // since could lead to older leaves, whose values still have good checksums.
        builder.set_check_integrity_on_open(options.check_on_open);
        #[cfg(any(test, feature = "contract"))]
        if !options.syncs {
            let db = unsynced::open(&builder, &path).map_err(database_error("open redb"))?;
            return Ok(Redb { db: RwLock::new(db), path });
        }
        let db = builder.open(&path).map_err(database_error("open redb"))?;
        Ok(Redb { db: RwLock::new(db), path })
    }

    fn db(&self) -> RwLockReadGuard<'_, Database> {
        self.db.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the file under another name first: half of one would look like damage.
fn create(dir: &Path, path: &Path) -> Result<(), StoreError> {
    let temporary = dir.join(format!("{FILE}.new"));
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(io_error("remove an unfinished database")(e));
        }
        _ => {}
    }
    let db = Database::create(&temporary).map_err(database_error("create redb"))?;
    let transaction = begin(&db)?;
    transaction.open_table(TABLE).map_err(table_error)?;
    transaction.commit().map_err(commit_error)?;
    db.close().map_err(database_error("create redb"))?;
    let finish = || {
        fs::File::open(&temporary)?.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_dir(dir)?;
        dir.parent().map_or(Ok(()), sync_dir)
    };
    finish().map_err(io_error("sync the store's files"))
}

fn begin(db: &Database) -> Result<redb::WriteTransaction, StoreError> {
    let mut transaction = db.begin_write().map_err(transaction_error)?;
    transaction
        .set_durability(Durability::Immediate)
        .map_err(|e| StoreError::Damaged { what: format!("begin a transaction: {e}") })?;
    Ok(transaction)
}

impl Backend for Redb {
    fn shows_unsynced(&self) -> bool {
        false
    }

    fn reader(&self) -> Result<Box<dyn Reader + '_>, StoreError> {
        let db = self.db();
        let transaction = db.begin_read().map_err(transaction_error)?;
        let table = transaction.open_table(TABLE).map_err(table_error)?;
        Ok(Box::new(Snapshot { table, _db: db }))
    }

    fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        let transaction = begin(&self.db())?;
        {
            let mut table = transaction.open_table(TABLE).map_err(table_error)?;
            for change in changes {
                let key = &*change.stored_key;
                match &change.stored {
                    Some(value) => table.insert(key, &**value).map(drop),
                    None => table.remove(key).map(drop),
                }
                .map_err(storage_error("commit"))?;
            }
        }
        transaction.commit().map_err(commit_error)
    }

    fn sync(&self) -> Result<(), StoreError> {
        // Each commit is synced when it returns.
        Ok(())
    }

    fn stored(&self) -> &dyn Backend {
        self
    }

    fn sealed(&self, key: Bytes, value: Option<Bytes>) -> Result<Change, StoreError> {
        Ok(Change::plain(key, value))
    }

    fn opened_entry(&self, key: &Bytes, stored: &Bytes) -> Result<(Bytes, Bytes), StoreError> {
        Ok((key.clone(), stored.clone()))
    }

    fn verify(&self) -> Result<(), StoreError> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        match db.check_integrity() {
            Ok(true) => Ok(()),
            Ok(false) => Err(StoreError::Damaged { what: "redb had to repair its pages".into() }),
            Err(e) => Err(database_error("verify")(e)),
        }
    }

    fn trim(&self) -> Result<(), StoreError> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        match db.compact() {
            Ok(_) => Ok(()),
            Err(CompactionError::Storage(e)) => Err(storage_error("compact")(e)),
            Err(other) => Err(StoreError::Io { operation: "compact", cause: other.to_string() }),
        }
    }

    fn disk_bytes(&self) -> u64 {
        fs::metadata(&self.path).map_or(0, |file| file.len())
    }
}

type Table = ReadOnlyTable<&'static [u8], &'static [u8]>;
type Guard = AccessGuard<'static, &'static [u8]>;

/// A read transaction.
struct Snapshot<'a> {
    table: Table,
    /// Let go after the table: the database is verified only when there is no transaction.
    _db: RwLockReadGuard<'a, Database>,
}

impl Reader for Snapshot<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let found = self.table.get(key).map_err(storage_error("get"))?;
        Ok(found.map(|value| Bytes::from(value.value())))
    }

    fn range(&self, range: &KeyRange, descending: bool) -> Result<Entries<'_>, StoreError> {
        let entries = self.table.range::<&[u8]>(range.bounds::<&[u8]>());
        let entries = entries.map_err(storage_error("scan"))?;
        let owned = |entry: Result<(Guard, Guard), StorageError>| match entry {
            Ok((key, value)) => Ok((Bytes::from(key.value()), Bytes::from(value.value()))),
            Err(e) => Err(storage_error("scan")(e)),
        };
        if descending { Ok(Box::new(entries.rev().map(owned))) } else { Ok(Box::new(entries.map(owned))) }
    }

    fn walk(&self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        for entry in self.table.iter().map_err(storage_error("scan"))? {
            let (key, value) = entry.map_err(storage_error("scan"))?;
            visit(key.value(), value.value())?;
        }
        Ok(())
    }
}

fn storage_error(operation: &'static str) -> impl Fn(StorageError) -> StoreError {
    move |error| match error {
        StorageError::Io(e) => file_error(operation, e),
        other @ (StorageError::PreviousIo | StorageError::Unsupported) => {
            StoreError::Io { operation, cause: other.to_string() }
        }
        other => StoreError::Damaged { what: format!("{operation}: {other}") },
    }
}

fn database_error(operation: &'static str) -> impl Fn(DatabaseError) -> StoreError {
    move |error| match error {
        DatabaseError::Storage(e) => storage_error(operation)(e),
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { dir: FILE.into(), pid: 0 },
        other @ DatabaseError::TransactionInProgress => {
            StoreError::Io { operation, cause: other.to_string() }
        }
        other => StoreError::Damaged { what: format!("{operation}: {other}") },
    }
}

fn transaction_error(error: TransactionError) -> StoreError {
    match error {
        TransactionError::Storage(e) => storage_error("begin a transaction")(e),
        other => StoreError::Damaged { what: format!("begin a transaction: {other}") },
    }
}

fn table_error(error: TableError) -> StoreError {
    match error {
        TableError::Storage(e) => storage_error("open the table")(e),
        other => StoreError::Damaged { what: format!("open the table: {other}") },
    }
}

fn commit_error(error: CommitError) -> StoreError {
    match error {
        CommitError::Storage(e) => storage_error("commit")(e),
        other => StoreError::Damaged { what: format!("commit: {other}") },
    }
}

/// redb on a file that is never synced; see `StoreOptions::without_syncs_for_tests`.
#[cfg(any(test, feature = "contract"))]
mod unsynced {
    use std::fs::File;
    use std::io;
    use std::path::Path;

    use redb::backends::FileBackend;
    use redb::{Builder, Database, DatabaseError, StorageBackend, StorageError};

    pub(super) fn open(builder: &Builder, path: &Path) -> Result<Database, DatabaseError> {
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(|e| DatabaseError::Storage(StorageError::Io(e)))?;
        builder.create_with_backend(Unsynced(FileBackend::new(file)?))
    }

    #[derive(Debug)]
    struct Unsynced(FileBackend);

    impl StorageBackend for Unsynced {
        fn len(&self) -> io::Result<u64> {
            self.0.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.0.read(offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.0.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            Ok(())
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.0.write(offset, data)
        }
    }
}
