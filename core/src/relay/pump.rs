//! Serving the feed: each connection at its own pace, its channels in turn.

use super::ConnId;
use super::feed;
use super::hub::Relay;
use super::session::ChannelState;
use crate::clock::Now;
use crate::store::{CommitNo, StoreError};
use crate::wire::{CaughtUp, Channel, FaultCode, Feed};

impl Relay {
    /// Sends a connection as much of its feeds as its network has room for. Only durable
    /// entries are read, so nothing here waits for a commit. A slow device pauses itself and
    /// nobody else.
    pub(super) fn pump(&mut self, now: Now, id: ConnId) -> Result<(), StoreError> {
        while let Some(channel) = self.next_to_serve(now, id) {
            match self.serve(id, channel) {
                Err(StoreError::Damaged { what }) => {
                    tracing::error!(%what, "the feed can't be served");
                    if let Some(state) = self.channel_mut(id, channel) {
                        state.cursor = None;
                    }
                    self.fault(id, channel, FaultCode::Internal, "the relay can't read its feed");
                }
                served => served?,
            }
        }
        Ok(())
    }

    /// The next channel, after the one served last, that has something to be told.
    fn next_to_serve(&self, now: Now, id: ConnId) -> Option<Channel> {
        let conn = self.conns.get(&id)?;
        if !conn.has_room(self.config.send_window) {
            return None;
        }
        let waits = |state: &ChannelState| {
            let durable = self.workspaces.get(&state.workspace).map_or(0, |w| w.durable.seq);
            state.is_valid(now.wall) && state.cursor.is_some_and(|c| c.next <= durable || !c.told)
        };
        let later = conn.channels.range(conn.served..).filter(|(channel, _)| **channel != conn.served);
        let all = later.chain(conn.channels.range(..=conn.served));
        all.filter(|(_, state)| waits(state)).map(|(channel, _)| *channel).next()
    }

    /// Sends one page, or that there is no more.
    fn serve(&mut self, id: ConnId, channel: Channel) -> Result<(), StoreError> {
        let epoch = self.epoch;
        let Some(conn) = self.conns.get_mut(&id) else { return Ok(()) };
        conn.served = channel;
        let device = conn.device;
        let Some(state) = conn.channels.get_mut(&channel) else { return Ok(()) };
        let Some(mut cursor) = state.cursor else { return Ok(()) };
        let Some(workspace) = self.workspaces.get(&state.workspace) else { return Ok(()) };
        let durable = workspace.durable;
        if cursor.next > durable.seq {
            cursor.told = true;
            state.cursor = Some(cursor);
            let done = CaughtUp { channel, epoch, cursor: durable.seq, digest: durable.digest.0 };
            self.send(id, CommitNo(0), done);
            return Ok(());
        }
        let reader = state.reader(device, cursor.full);
        let page = feed::page(&*self.store, state.workspace, cursor.next, durable.seq, reader)?;
        cursor.next = page.last + 1;
        cursor.told = false;
        state.cursor = Some(cursor);
        if !page.entries.is_empty() {
            self.send(id, CommitNo(0), Feed { channel, entries: page.entries, end: durable.seq });
        }
        Ok(())
    }

    fn channel_mut(&mut self, id: ConnId, channel: Channel) -> Option<&mut ChannelState> {
        self.conns.get_mut(&id)?.channels.get_mut(&channel)
    }
}
