#![no_main]
anabranch_fuzz::target!(files);
