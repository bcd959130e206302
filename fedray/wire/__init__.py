"""Messages to bytes and back; every byte that is counted is a byte of a payload."""

from fedray.wire.chain import Chain, Delta
from fedray.wire.codec import Codec, Packet, Way, Wire
from fedray.wire.download import Downlink, Download, advance
from fedray.wire.ledger import Ledger, PartSize, Transfer
from fedray.wire.squeeze import Zstd
from fedray.wire.transforms import PowerSGD, RandomK, Threshold, TopK, stc
from fedray.wire.writers import QSGD, BFloat16, Float16, Float32, ScaledSign, Sign, Uniform

__all__ = [
    "QSGD",
    "BFloat16",
    "Chain",
    "Codec",
    "Delta",
    "Downlink",
    "Download",
    "Float16",
    "Float32",
    "Ledger",
    "Packet",
    "PartSize",
    "PowerSGD",
    "RandomK",
    "ScaledSign",
    "Sign",
    "Threshold",
    "TopK",
    "Transfer",
    "Uniform",
    "Way",
    "Wire",
    "Zstd",
    "advance",
    "stc",
]
