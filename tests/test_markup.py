"""Text from elsewhere is text, wherever it is shown."""

from __future__ import annotations

import pytest

from renorm.markup import picture_text, printable


@pytest.mark.parametrize(
    "name", ["$x_$.npz", r"$\frac{$", r"a\$b", "100 $", "no text \udce9", "a\x1b[31m", "two\nlines"]
)
def test_pictures_show_any_name_as_it_is(name: str) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    FigureCanvasAgg(figure)
    drawn = figure.suptitle(picture_text(name))
    figure.canvas.draw()  # raises at text that is no formula
    shown, is_formula = drawn._preprocess_math(drawn.get_text())
    assert not is_formula
    assert shown == "\n".join(map(printable, name.split("\n")))


def test_printable_text_is_one_line_without_control_characters() -> None:
    assert printable("ünï 数据 [b]\t\n\x1b\u2028\udce9") == r"ünï 数据 [b]\t\n\x1b\u2028\udce9"
