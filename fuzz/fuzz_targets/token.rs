#![no_main]
anabranch_fuzz::target!(token);
