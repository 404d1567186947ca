"""Owns the rule that says which documents are held out of training.

Refuses to know where a document comes from or what it is used for: it sees one text and answers yes or no.
"""

from __future__ import annotations

import hashlib

#: One document in this many is held out.
HELD_OUT_ONE_IN = 10


def is_held_out(text: str) -> bool:
    """Whether a document belongs to the evaluation part.

    The answer is a function of the text alone: the first 8 bytes of its sha256, as a big-endian number,
    divisible by 10. Why a hash and not a position or a random draw: the same document stays on the same
    side in every Python version and file order, on every rank, when documents come or go around it, and
    when one text comes twice. So a model trained on the train part of a source has not met a text of its
    eval part.

    The price: an *edited* document is another text and may change sides; a source that is one document has no
    split by this rule; and the held-out share of the characters is only near a tenth, as documents differ in
    length.

    Args:
        text: The whole document, as it will be tokenised. Any string, the empty one included.

    Returns:
        True for about one document in ten.

    Raises:
        UnicodeEncodeError: The text holds lone surrogates, which have no UTF-8 form.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0
