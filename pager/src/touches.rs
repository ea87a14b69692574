//! Which pages the machine touches first, in that order, for the source to keep.

use std::sync::{Mutex, MutexGuard, PoisonError};

use lazyvm_wire::PageIndex;
use lazyvm_wire::control::TOUCHED_MAX;
use tokio::sync::Notify;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Touches {
    /// As long as they are recorded.
    pages: Mutex<Option<Vec<PageIndex>>>,
    full: Notify,
}

impl Touches {
    /// Records them from now on.
    pub fn begin(&self) {
        self.lock().get_or_insert_default();
    }

    /// Whether they are recorded.
    pub fn are_recorded(&self) -> bool {
        self.lock().is_some()
    }

    /// This one is next.
    pub fn add(&self, page: PageIndex) {
        if let Some(pages) = &mut *self.lock() {
            if pages.len() < TOUCHED_MAX {
                pages.push(page);
            }
            if pages.len() == TOUCHED_MAX {
                self.full.notify_one();
            }
        }
    }

    /// Waits until no more of them can be taken in.
    pub async fn full(&self) {
        self.full.notified().await;
    }

    /// Records no more; gives what was recorded.
    pub fn end(&self) -> Option<Vec<PageIndex>> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<PageIndex>>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn as_many_as_a_message_holds_are_kept_in_their_order() {
        let touches = Touches::default();
        touches.add(PageIndex(7));
        assert_eq!(touches.end(), None);
        touches.begin();
        for page in (0..=TOUCHED_MAX as u64).rev() {
            touches.add(PageIndex(page));
        }
        touches.full().await;
        let pages = touches.end().unwrap();
        assert_eq!(pages.len(), TOUCHED_MAX);
        assert_eq!(
            pages[..2],
            [TOUCHED_MAX as u64, TOUCHED_MAX as u64 - 1].map(PageIndex)
        );
        assert!(!touches.are_recorded());
    }
}
