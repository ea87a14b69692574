//! Packets as a TUN device with `IFF_VNET_HDR` gives and takes them: an IP packet that may stand for many (TSO, USO), and
//! a header that says so. The header is `struct virtio_net_hdr` of the kernel's `include/uapi/linux/virtio_net.h`, in the
//! machine's own byte order.
//!
//! One that stands for many is counted, and where need be lost, segment by segment: [`Packet::segments`] tells their
//! sizes, [`Packet::part`] makes one of some of them.

/// Length of the header.
pub const VNET_HEADER_BYTES: usize = 10;

/// Longest packet with its header.
pub const PACKET_BYTES_MAX: usize = VNET_HEADER_BYTES + 65_535;

/// `VIRTIO_NET_HDR_GSO_*`.
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

const IP_TCP: u8 = 6;
const IP_UDP: u8 = 17;
const UDP_HEADER_BYTES: usize = 8;
const TCP_HEADER_BYTES_MIN: usize = 20;
const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// One read of the device.
pub struct Packet {
    /// With the header in front.
    bytes: Vec<u8>,
    /// Where the payload begins and how long a segment's is, of a packet that stands for many.
    many: Option<Many>,
}

#[derive(Clone, Copy)]
struct Many {
    protocol: u8,
    /// Offset of the TCP or UDP header in `bytes`.
    transport: usize,
    /// Offset of the payload in `bytes`.
    payload: usize,
    /// Bytes of payload in each segment but the last.
    size: usize,
}

impl Packet {
    /// Takes what was read; `None` when it is too short to be a packet.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        (bytes.len() > VNET_HEADER_BYTES).then(|| Self {
            many: many(bytes),
            bytes: bytes.to_vec(),
        })
    }

    /// What is to be written.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes of IP that cross the path for it.
    pub fn wire_bytes(&self) -> u64 {
        self.segments().sum()
    }

    /// Packets on the path.
    pub fn count(&self) -> usize {
        self.many.map_or(1, |many| {
            (self.bytes.len() - many.payload).div_ceil(many.size).max(1)
        })
    }

    /// The size of each, in bytes of IP.
    pub fn segments(&self) -> impl Iterator<Item = u64> + use<> {
        let (headers, payload, size) = match self.many {
            None => (self.bytes.len() - VNET_HEADER_BYTES, 0, 1),
            Some(many) => (
                many.payload - VNET_HEADER_BYTES,
                self.bytes.len() - many.payload,
                many.size,
            ),
        };
        (0..self.count())
            .map(move |number| (headers + payload.saturating_sub(number * size).min(size)) as u64)
    }

    /// The port that it goes to, of TCP and of UDP alike.
    pub fn to_port(&self) -> Option<u16> {
        let ip = self.bytes.get(VNET_HEADER_BYTES..)?;
        let is_ip4 = ip.first()? >> 4 == 4;
        let has_ports = is_ip4 && [IP_TCP, IP_UDP].contains(ip.get(9)?);
        let at = usize::from(ip[0] & 0x0f) * 4 + 2;
        let port = ip.get(at..at + 2).filter(|_| has_ports)?;
        Some(u16::from_be_bytes([port[0], port[1]]))
    }

    /// A packet of `count` segments from `first` on; itself when that is all of it.
    pub fn part(&self, first: usize, count: usize) -> Self {
        let total = self.count();
        let Some(many) = self.many.filter(|_| count < total) else {
            return Self {
                bytes: self.bytes.clone(),
                many: self.many,
            };
        };
        let from = (many.payload + first * many.size).min(self.bytes.len());
        let to = (from + count * many.size).min(self.bytes.len());
        let mut bytes = Vec::with_capacity(many.payload + to - from);
        bytes.extend_from_slice(&self.bytes[..many.payload]);
        bytes.extend_from_slice(&self.bytes[from..to]);
        let ip_bytes = (bytes.len() - VNET_HEADER_BYTES) as u16;
        let transport_bytes = (bytes.len() - many.transport) as u16;
        set_u16(&mut bytes, VNET_HEADER_BYTES + 2, ip_bytes);
        let id = get_u16(&bytes, VNET_HEADER_BYTES + 4).wrapping_add(first as u16);
        set_u16(&mut bytes, VNET_HEADER_BYTES + 4, id);
        let check = ip_checksum(&bytes[VNET_HEADER_BYTES..many.transport]);
        set_u16(&mut bytes, VNET_HEADER_BYTES + 10, check);
        if many.protocol == IP_TCP {
            let sequence = &mut bytes[many.transport + 4..many.transport + 8];
            let number = u32::from_be_bytes([sequence[0], sequence[1], sequence[2], sequence[3]])
                .wrapping_add((first * many.size) as u32);
            sequence.copy_from_slice(&number.to_be_bytes());
            let flags = &mut bytes[many.transport + 13];
            if first + count < total {
                *flags &= !(TCP_FIN | TCP_PSH);
            }
            if first > 0 {
                *flags &= !TCP_CWR;
            }
        } else {
            set_u16(&mut bytes, many.transport + 4, transport_bytes);
        }
        // The kernel sums up payload and transport header itself, from the pseudo-header's sum on (NEEDS_CSUM).
        let pseudo = pseudo_header_sum(&bytes, many, transport_bytes);
        let at = many.transport + if many.protocol == IP_TCP { 16 } else { 6 };
        set_u16(&mut bytes, at, pseudo);
        let mut many = Some(many);
        if count == 1 {
            many = None;
            bytes[1] = GSO_NONE;
            bytes[4..6].fill(0);
        }
        Self { bytes, many }
    }
}

/// Of a packet with its header: whether it stands for many. What can't be read stands for itself.
fn many(bytes: &[u8]) -> Option<Many> {
    let kind = bytes[1] & !GSO_ECN;
    let size = usize::from(u16::from_ne_bytes([bytes[4], bytes[5]]));
    let ip = bytes.get(VNET_HEADER_BYTES..)?;
    if !matches!(kind, GSO_TCP4 | GSO_UDP_L4) || size == 0 || ip.len() < 20 || ip[0] >> 4 != 4 {
        return None;
    }
    let ip_header = usize::from(ip[0] & 0x0f) * 4;
    let transport = VNET_HEADER_BYTES + ip_header;
    let protocol = ip[9];
    let header = match (kind, protocol) {
        (GSO_TCP4, IP_TCP) => usize::from(*bytes.get(transport + 12)? >> 4) * 4,
        (GSO_UDP_L4, IP_UDP) => UDP_HEADER_BYTES,
        _ => return None,
    };
    let least = match protocol {
        IP_TCP => TCP_HEADER_BYTES_MIN,
        _ => UDP_HEADER_BYTES,
    };
    let payload = transport + header;
    (ip_header >= 20 && header >= least && payload < bytes.len()).then_some(Many {
        protocol,
        transport,
        payload,
        size,
    })
}

fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn set_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// RFC 791's, of a header whose own checksum counts as 0.
fn ip_checksum(header: &[u8]) -> u16 {
    let sum = (0..header.len() / 2)
        .filter(|word| *word != 5)
        .map(|word| u32::from(get_u16(header, 2 * word)))
        .sum();
    !folded(sum)
}

fn pseudo_header_sum(bytes: &[u8], many: Many, transport_bytes: u16) -> u16 {
    let addresses: u32 = (0..4)
        .map(|word| u32::from(get_u16(bytes, VNET_HEADER_BYTES + 12 + 2 * word)))
        .sum();
    folded(addresses + u32::from(many.protocol) + u32::from(transport_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A packet of `payload` bytes that stands for segments of 1000.
    fn tcp(payload: usize) -> Packet {
        let mut bytes = vec![0; VNET_HEADER_BYTES + 40 + payload];
        let length = bytes.len();
        bytes[0] = 1;
        bytes[1] = GSO_TCP4;
        bytes[4..6].copy_from_slice(&1000_u16.to_ne_bytes());
        let ip = &mut bytes[VNET_HEADER_BYTES..];
        ip[0] = 0x45;
        set_u16(ip, 2, (length - VNET_HEADER_BYTES) as u16);
        set_u16(ip, 4, 0xffff);
        ip[9] = IP_TCP;
        ip[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        let check = ip_checksum(&ip[..20]);
        set_u16(ip, 10, check);
        set_u16(ip, 22, 443);
        ip[24..28].copy_from_slice(&0xffff_ff00_u32.to_be_bytes());
        ip[32] = 5 << 4;
        ip[33] = TCP_FIN | TCP_PSH | TCP_CWR | 0x10;
        for (number, byte) in (0..).zip(&mut ip[40..]) {
            *byte = (number / 1000) as u8;
        }
        Packet::new(&bytes).unwrap()
    }

    #[test]
    fn segments_are_counted_with_their_headers() {
        let packet = tcp(2500);
        assert_eq!(packet.count(), 3);
        assert_eq!(packet.segments().collect::<Vec<_>>(), [1040, 1040, 540]);
        assert_eq!(packet.wire_bytes(), 2620);
        assert_eq!(packet.to_port(), Some(443));
    }

    #[test]
    fn a_packet_without_segments_is_one() {
        let packet = Packet::new(&[0; VNET_HEADER_BYTES + 100]).unwrap();
        assert_eq!(packet.to_port(), None);
        assert_eq!(packet.segments().collect::<Vec<_>>(), [100]);
        assert!(Packet::new(&[0; VNET_HEADER_BYTES]).is_none());
    }

    #[test]
    fn a_part_has_headers_of_its_own() {
        let packet = tcp(2500);
        let middle = packet.part(1, 1);
        let ip = &middle.bytes()[VNET_HEADER_BYTES..];
        assert_eq!((ip.len(), middle.count()), (1040, 1));
        assert_eq!(get_u16(ip, 2), 1040);
        assert_eq!(get_u16(ip, 4), 0, "the identification goes on");
        assert_eq!(get_u16(ip, 10), ip_checksum(&ip[..20]));
        assert_eq!(
            ip[24..28],
            0x0000_02e8_u32.to_be_bytes(),
            "and wraps around"
        );
        assert_eq!(ip[33], 0x10);
        assert!(ip[40..].iter().all(|&byte| byte == 1));
        assert_eq!(middle.bytes()[1], GSO_NONE);
        let end = packet.part(1, 2);
        assert_eq!(end.segments().collect::<Vec<_>>(), [1040, 540]);
        assert_eq!(
            end.bytes()[VNET_HEADER_BYTES + 33],
            0x10 | TCP_FIN | TCP_PSH
        );
        assert_eq!(packet.part(0, 3).bytes(), packet.bytes());
    }

    #[test]
    fn a_part_of_many_datagrams_has_their_length() {
        let mut bytes = vec![0; VNET_HEADER_BYTES + 28 + 2500];
        bytes[0] = 1;
        bytes[1] = GSO_UDP_L4;
        bytes[4..6].copy_from_slice(&1000_u16.to_ne_bytes());
        bytes[VNET_HEADER_BYTES] = 0x45;
        bytes[VNET_HEADER_BYTES + 9] = IP_UDP;
        let packet = Packet::new(&bytes).unwrap();
        assert_eq!(packet.segments().collect::<Vec<_>>(), [1028, 1028, 528]);
        for (first, count, payload) in [(0, 1, 1000), (0, 2, 2000), (1, 2, 1500), (2, 1, 500)] {
            let part = packet.part(first, count);
            let ip = &part.bytes()[VNET_HEADER_BYTES..];
            assert_eq!(ip.len(), 28 + payload);
            assert_eq!(usize::from(get_u16(ip, 24)), 8 + payload, "{first} {count}");
            assert_eq!(part.count(), count);
        }
    }

    #[test]
    fn nonsense_stands_for_itself() {
        for length in VNET_HEADER_BYTES + 1..VNET_HEADER_BYTES + 80 {
            for kind in 0..=255 {
                let mut bytes = vec![kind; length];
                bytes[VNET_HEADER_BYTES] = 0x45;
                if let Some(packet) = Packet::new(&bytes) {
                    packet.to_port();
                    for first in 0..packet.count() {
                        packet.part(first, 1);
                    }
                }
            }
        }
    }
}
