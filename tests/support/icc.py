"""Colour profiles written from their definition, and what they make of a colour in closed form."""

import struct

import numpy as np

# Red, green, blue as XYZ under D50, which is what profiles hold (Lindbloom, Bradford-adapted).
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
ADOBE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
D50 = (0.9642, 1.0, 0.8249)


def srgb_to_linear(x):
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(x):
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.maximum(x, 0) ** (1 / 2.4) - 0.055)


def expected(colour, matrix, gamma=None):
    """A colour of 0 to 255 in such a space, as levels of sRGB."""
    levels = np.asarray(colour) / 255
    linear = srgb_to_linear(levels) if gamma is None else levels**gamma
    found = np.linalg.solve(SRGB, matrix @ linear)
    return np.round(255 * linear_to_srgb(np.clip(found, 0, 1)))


def s15(value):
    return struct.pack(">i", round(value * 65536))


def xyz(values):
    return b"XYZ \0\0\0\0" + b"".join(map(s15, values))


def curve(gamma):
    """A power, or sRGB's curve in its parametric form where `gamma` is None."""
    if gamma is None:
        parameters = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
        return b"para\0\0\0\0\0\x03\0\0" + b"".join(map(s15, parameters))
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def profile(space, tags, kind=b"mntr", pcs=b"XYZ ", version=0x04200000):
    """An ICC profile of these tags."""
    name = (
        b"mluc\0\0\0\0"
        + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 8, 28)
        + "test".encode("utf-16-be")
    )
    tags = {b"desc": name, b"cprt": name, b"wtpt": xyz(D50), **tags}
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"\0" * 4, version, kind, space, pcs)
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += b"".join(map(s15, D50))
    return head.ljust(128, b"\0") + table + body


def matrix_profile(matrix, gamma=None):
    """An RGB profile of three primaries and one curve."""
    columns = {tag: xyz(matrix[:, i]) for i, tag in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return profile(b"RGB ", columns | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma)))


def grey_profile(gamma):
    return profile(b"GRAY", {b"kTRC": curve(gamma)})


def cmyk_profile():
    """Inks of which any is black: lightness falls with their sum, and there is no colour."""
    cells = bytearray()
    for i in range(16):
        inks = bin(i).count("1")
        cells += bytes([max(0, 255 - 255 * inks), 128, 128])
    ramp = bytes(range(256))
    identity = b"".join(map(s15, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + bytes(cells) + ramp * 3
    return profile(b"CMYK", {b"A2B0": table}, b"prtr", b"Lab ", 0x02400000)
