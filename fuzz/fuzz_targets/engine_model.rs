#![no_main]
anabranch_fuzz::target!(engine_model);
