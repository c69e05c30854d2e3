"""Fourier's transforms, and complex numbers as pairs of real ones."""

from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws.movement import along
from equinorm.permuting.laws.registry import Call, law
from equinorm.permuting.values import Laid


@law("_fft_r2c _fft_c2c _fft_c2r")
def transformed(book: LawBook, call: Call) -> Laid:
    """Fourier's transform: frequencies in the place of positions."""
    return along(book, call.input, call.dim, call.shape)


@law("view_as_real view_as_real_copy")
def pairs(book: LawBook, call: Call) -> Laid:
    """Real and imaginary parts along a new last axis."""
    return Laid((*call.input.axes, book.fixed(2)))


@law("view_as_complex view_as_complex_copy")
def from_pairs(book: LawBook, call: Call) -> Laid:
    """Complex numbers of pairs along the last axis."""
    return along(book, call.input, [-1], call.input.shape).with_axis(-1)
