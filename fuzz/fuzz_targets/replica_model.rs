#![no_main]
anabranch_fuzz::target!(replica_model);
