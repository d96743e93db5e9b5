//! Serving the feed: each connection at its own pace, its channels in turn.

use super::feed;
use super::hub::Relay;
use super::session::ChannelState;
use super::{ConnId, Output};
use crate::clock::Now;
use crate::store::{CommitNo, StoreError};
use crate::wire::{CaughtUp, Channel, FaultCode, Feed, Message};

impl Relay {
    /// Sends a connection one page of one of its feeds, or that there is no more. Only durable
    /// entries are read, so nothing here waits for a commit. A slow device pauses itself and
    /// nobody else.
    pub(super) fn feed(&mut self, id: ConnId, channel: Channel) -> Result<(), StoreError> {
        match self.serve(id, channel) {
            Err(StoreError::Damaged { what }) => {
                tracing::error!(%what, "the feed can't be served");
                if let Some(state) = self.channel_mut(id, channel) {
                    state.cursor = None;
                }
                self.fault(id, channel, FaultCode::Internal, "the relay can't read its feed");
                Ok(())
            }
            served => served,
        }
    }

    /// The next channel, after the one served last, that has something to be told.
    pub(super) fn next_to_serve(&self, now: Now, id: ConnId) -> Option<Channel> {
        let conn = self.conns.get(&id)?;
        if !conn.has_room(self.config.send_window) {
            return None;
        }
        let waits = |state: &ChannelState| self.lags(state) && state.is_valid(now.wall);
        let later = conn.channels.range(conn.served..).filter(|(channel, _)| **channel != conn.served);
        let all = later.chain(conn.channels.range(..=conn.served));
        all.filter(|(_, state)| waits(state)).map(|(channel, _)| *channel).next()
    }

    /// Whether a channel was not told everything yet.
    pub(super) fn lags(&self, state: &ChannelState) -> bool {
        let durable = self.workspaces.get(&state.workspace).map_or(0, |w| w.durable.seq);
        state.cursor.is_some_and(|c| c.next <= durable || !c.told)
    }

    /// Sends one page, or that there is no more.
    fn serve(&mut self, id: ConnId, channel: Channel) -> Result<(), StoreError> {
        let epoch = self.epoch;
        let Some(conn) = self.conns.get_mut(&id) else { return Ok(()) };
        conn.served = channel;
        let device = conn.device;
        let Some(state) = conn.channels.get_mut(&channel) else { return Ok(()) };
        let Some(mut cursor) = state.cursor else { return Ok(()) };
        let Some(workspace) = self.workspaces.get_mut(&state.workspace) else { return Ok(()) };
        let durable = workspace.durable;
        if cursor.next > durable.seq {
            cursor.told = true;
            state.cursor = Some(cursor);
            let done = CaughtUp { channel, epoch, cursor: durable.seq, digest: durable.digest.0 };
            self.send(id, CommitNo(0), done);
            return Ok(());
        }
        let reader = state.reader(device, cursor.full);
        let from = cursor.next;
        let (last, bytes) = match workspace.pages.get(from, channel, reader) {
            Some(shared) => (shared.last, Some(shared.bytes.clone())),
            None => {
                let mut page = feed::page(&*self.store, state.workspace, from, durable.seq, reader)?;
                let entries = std::mem::take(&mut page.entries);
                let bytes = (!entries.is_empty()).then(|| {
                    let message = Message::from(Feed { channel, entries, end: durable.seq });
                    let bytes = message.encode();
                    workspace.pages.keep((from, channel), &page, durable.seq, reader, &bytes);
                    bytes
                });
                (page.last, bytes)
            }
        };
        cursor.next = last + 1;
        cursor.told = false;
        state.cursor = Some(cursor);
        if let Some(bytes) = bytes {
            self.queue(id, CommitNo(0), Output::Send { conn: id, bytes });
        }
        Ok(())
    }

    fn channel_mut(&mut self, id: ConnId, channel: Channel) -> Option<&mut ChannelState> {
        self.conns.get_mut(&id)?.channels.get_mut(&channel)
    }
}
