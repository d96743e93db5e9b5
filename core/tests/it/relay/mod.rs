//! The relay's decisions, told as stories: who gets in, what is taken, who hears of it.

mod admission;
mod anything;
mod feed;
mod schemas;
mod sessions;
mod sign_in;
mod stored;
