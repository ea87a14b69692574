//! A [`MachineOffer`] in JSON: its bytes in hexadecimal.

use data_encoding::HEXLOWER;
use lazyvm_wire::{COMPATIBILITY_MAX, MachineOffer};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

#[derive(Serialize, Deserialize)]
struct OfferText {
    kind: String,
    state_version: u32,
    compatibility: String,
}

pub(super) fn serialize<S: Serializer>(offer: &MachineOffer, to: S) -> Result<S::Ok, S::Error> {
    OfferText {
        kind: offer.kind.clone(),
        state_version: offer.state_version,
        compatibility: HEXLOWER.encode(&offer.compatibility),
    }
    .serialize(to)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<MachineOffer, D::Error> {
    let text = OfferText::deserialize(from)?;
    let compatibility = HEXLOWER
        .decode(text.compatibility.as_bytes())
        .map_err(|error| D::Error::custom(format!("compatibility: {error}")))?;
    if compatibility.len() > COMPATIBILITY_MAX {
        return Err(D::Error::custom("compatibility: too long"));
    }
    Ok(MachineOffer {
        kind: text.kind,
        state_version: text.state_version,
        compatibility,
    })
}
