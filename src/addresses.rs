//! Under which addresses a destination can reach this host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Context;
use lazyvm_wire::ADDRESSES_MAX;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;

/// The addresses for the ticket of a server that listens at `listening`: those that the user names, or its own, or,
/// where it listens on all of them, those of this host's interfaces that are up, loopback last.
pub fn advertised(listening: SocketAddr, named: &[SocketAddr]) -> anyhow::Result<Vec<SocketAddr>> {
    if !named.is_empty() {
        return Ok(named.to_vec());
    }
    if !listening.ip().is_unspecified() {
        return Ok(vec![listening]);
    }
    let found = interface_addresses()
        .context("can't list this host's addresses; name them with --advertise")?;
    Ok(chosen(listening, found))
}

fn interface_addresses() -> nix::Result<Vec<IpAddr>> {
    let found = getifaddrs()?
        .filter(|interface| interface.flags.contains(InterfaceFlags::IFF_UP))
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address
                .as_sockaddr_in()
                .map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| {
                address
                    .as_sockaddr_in6()
                    .map(|address| IpAddr::V6(address.ip()))
            })
        });
    Ok(found.collect())
}

/// A destination tries them in this order.
fn chosen(listening: SocketAddr, mut found: Vec<IpAddr>) -> Vec<SocketAddr> {
    found.retain(|address| match address {
        IpAddr::V4(address) => !address.is_link_local(),
        // A link-local address needs a scope, which means something on this host only.
        IpAddr::V6(address) => listening.is_ipv6() && !address.is_unicast_link_local(),
    });
    found.sort_by_key(IpAddr::is_loopback);
    found.dedup();
    found.truncate(ADDRESSES_MAX);
    if found.is_empty() {
        found.push(if listening.is_ipv4() {
            Ipv4Addr::LOCALHOST.into()
        } else {
            Ipv6Addr::LOCALHOST.into()
        });
    }
    found
        .into_iter()
        .map(|address| SocketAddr::new(address, listening.port()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn loopback_comes_last_and_link_local_addresses_not_at_all() {
        let found = addresses(&[
            "127.0.0.1",
            "169.254.1.1",
            "192.0.2.1",
            "::1",
            "fe80::1",
            "2001:db8::1",
        ]);
        let texts = |listening: &str| -> Vec<String> {
            let chosen = chosen(listening.parse().unwrap(), found.clone());
            chosen.iter().map(ToString::to_string).collect()
        };
        assert_eq!(texts("0.0.0.0:47"), ["192.0.2.1:47", "127.0.0.1:47"]);
        assert_eq!(
            texts("[::]:47"),
            [
                "192.0.2.1:47",
                "[2001:db8::1]:47",
                "127.0.0.1:47",
                "[::1]:47"
            ]
        );
    }

    #[test]
    fn a_host_without_addresses_still_has_itself() {
        let listening = "0.0.0.0:47".parse().unwrap();
        assert_eq!(
            chosen(listening, Vec::new()),
            ["127.0.0.1:47".parse().unwrap()]
        );
    }

    #[test]
    fn what_is_named_or_listened_at_is_taken_as_it_is() {
        let (one, any) = (
            "192.0.2.1:47".parse().unwrap(),
            "0.0.0.0:47".parse().unwrap(),
        );
        let named = ["198.51.100.1:4747".parse().unwrap()];
        assert_eq!(advertised(any, &named).unwrap(), named);
        assert_eq!(advertised(one, &[]).unwrap(), [one]);
        assert!(
            advertised(any, &[])
                .unwrap()
                .iter()
                .all(|address| address.port() == 47)
        );
    }
}
