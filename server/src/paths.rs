//! What the paths to destinations carried a short while ago: the next push to the same host need not begin as if nothing was
//! known of its path. Pure logic.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::session::lock;

/// How long a path is taken for what it was.
const KNOWN_FOR: Duration = Duration::from_secs(300);

/// Most paths.
const PATHS_MAX: usize = 1024;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Paths(HashMap<IpAddr, Path>);

#[derive(Debug, Default)]
struct Path {
    /// Bytes that were under way at a time, and when.
    window: Option<(u64, Instant)>,
    /// Pushes that are under way.
    pushes: u64,
}

impl Paths {
    /// A push to this host begins; [`Paths::end`] follows. Gives how many bytes may be under way for it, as far as that is
    /// known: those before it have their part.
    pub fn begin(&mut self, host: IpAddr, now: Instant) -> Option<u64> {
        if self.0.len() >= PATHS_MAX {
            self.0
                .retain(|_, path| path.pushes > 0 || path.is_known(now));
        }
        if self.0.len() >= PATHS_MAX && !self.0.contains_key(&host) {
            return None;
        }
        let path = self.0.entry(host).or_default();
        path.pushes += 1;
        let (window, _) = path.window.filter(|_| path.is_known(now))?;
        Some(window / path.pushes)
    }

    /// It is over; `window` bytes were under way for it at a time, where that is known.
    pub fn end(&mut self, host: IpAddr, window: Option<u64>, now: Instant) {
        let Some(path) = self.0.get_mut(&host) else {
            return;
        };
        // Those that shared the path had a part each.
        let pushes = path.pushes.max(1);
        path.pushes = pushes - 1;
        if let Some(window) = window {
            path.window = Some((window.saturating_mul(pushes), now));
        }
    }
}

/// One push, from its beginning until it is dropped.
pub(crate) struct OnPath {
    paths: Arc<Mutex<Paths>>,
    host: IpAddr,
    /// Bytes that may be under way for it, as far as known when it began.
    pub known: Option<u64>,
    /// Those that were under way at its end.
    pub window: Option<u64>,
}

impl OnPath {
    pub fn begin(paths: &Arc<Mutex<Paths>>, host: IpAddr) -> Self {
        Self {
            known: lock(paths).begin(host, Instant::now()),
            paths: Arc::clone(paths),
            host,
            window: None,
        }
    }
}

impl Drop for OnPath {
    fn drop(&mut self) {
        lock(&self.paths).end(self.host, self.window, Instant::now());
    }
}

impl Path {
    fn is_known(&self, now: Instant) -> bool {
        self.window
            .is_some_and(|(_, at)| now.saturating_duration_since(at) < KNOWN_FOR)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

    #[test]
    fn a_path_is_known_for_a_while_and_those_who_share_it_share_that() {
        let mut paths = Paths::default();
        let now = Instant::now();
        assert_eq!(paths.begin(HOST, now), None);
        paths.end(HOST, Some(12_000), now);
        let other = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
        assert_eq!(paths.begin(other, now), None);
        assert_eq!(paths.begin(HOST, now), Some(12_000));
        assert_eq!(paths.begin(HOST, now), Some(6_000));
        assert_eq!(paths.begin(HOST, now), Some(4_000));
        paths.end(HOST, Some(5_000), now);
        paths.end(HOST, Some(5_000), now);
        assert_eq!(paths.begin(HOST, now), Some(10_000 / 2));
        assert_eq!(paths.begin(HOST, now + KNOWN_FOR), None);
    }

    #[test]
    fn no_more_paths_are_remembered_than_there_may_be() {
        let mut paths = Paths::default();
        let host = |number: u32| IpAddr::V4(Ipv4Addr::from(number));
        let now = Instant::now();
        for number in 0..2 * PATHS_MAX as u32 {
            paths.begin(host(number), now);
        }
        assert_eq!(paths.0.len(), PATHS_MAX);
        for number in 0..2 * PATHS_MAX as u32 {
            paths.end(host(number), Some(1), now);
        }
        paths.begin(host(u32::MAX), now + KNOWN_FOR);
        assert_eq!(paths.0.len(), 1);
    }
}
