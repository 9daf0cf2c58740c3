"""Texts as they were written: what a browser or terminal would obey or hide gets a sign."""

from __future__ import annotations

SIGNS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}  # control pictures: ␛ for escape
SIGNS |= {0x7F: "\u2421"} | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
# marks that turn or isolate the direction of text, invisible ones, and halves of characters, which cannot be written
HIDDEN = (0x061C, 0x180E, 0xFEFF, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2070))
SIGNS |= {code: f"\\u{code:04x}" for code in (*HIDDEN, *range(0xD800, 0xE000))}


def visible(text: str) -> str:
    """The text with a sign in place of each control character; letters of all languages, tabs and line ends stay."""
    return text.translate(SIGNS)
