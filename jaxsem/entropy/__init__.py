"""The entropy stage: integers in, bytes out. It knows symbols and integer tables, no models and no images.

`tables` and `factorised` make frequency tables; `rans` codes long streams, `lanes` many short ones; `huffman` is a
code of whole bits. The byte formats are specified in the docstrings of these modules.
"""

from jaxsem.entropy.factorised import cumulative_logits, factorised_tables, quantiles_by_bisection
from jaxsem.entropy.huffman import HuffmanCode, code_lengths
from jaxsem.entropy.lanes import LONG, SHORT, StreamFormat, decode_lanes, encode_lanes
from jaxsem.entropy.rans import Decoder, Encoder
from jaxsem.entropy.reference import decode_short, encode_short
from jaxsem.entropy.tables import (
    Tables,
    gaussian_tables,
    quantise_counts,
    quantise_pmf,
    scale_index,
    scale_table,
    scale_thresholds,
    tables_from_counts,
)

__all__ = [
    "LONG",
    "SHORT",
    "Decoder",
    "Encoder",
    "HuffmanCode",
    "StreamFormat",
    "Tables",
    "code_lengths",
    "cumulative_logits",
    "decode_lanes",
    "decode_short",
    "encode_lanes",
    "encode_short",
    "factorised_tables",
    "gaussian_tables",
    "quantiles_by_bisection",
    "quantise_counts",
    "quantise_pmf",
    "scale_index",
    "scale_table",
    "scale_thresholds",
    "tables_from_counts",
]
