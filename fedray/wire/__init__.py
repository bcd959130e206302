"""Messages to bytes and back; every byte that is counted is a byte of a payload."""

from fedray.wire.codec import Codec, Packet
from fedray.wire.ledger import Ledger, PartSize, Transfer
from fedray.wire.stages import Float16, Float32, Stage

__all__ = ["Codec", "Float16", "Float32", "Ledger", "Packet", "PartSize", "Stage", "Transfer"]
