import re
from html.parser import HTMLParser

import pytest

from paraboloid.report import render

VOID = {"meta", "link", "br", "path", "use", "rect", "circle", "line", "polygon"}


class Outline(HTMLParser):
    """Ids, references, addresses and balance of the tags of a page."""

    def __init__(self, page):
        super().__init__()
        self.ids, self.references, self.addresses, self.open, self.text = [], set(), [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        for name, value in attrs:
            value = value or ""
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "action", "poster", "data"):
                self.addresses.append(value)
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value))
            if name == "href" and value.startswith("#"):
                self.references.add(value[1:])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def visible(page):
    return re.sub(r"\s+", " ", " ".join(Outline(re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)).text))


def test_the_page_is_whole_and_fetches_nothing(page):
    outline = Outline(page)
    assert not outline.open
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.references <= {*outline.ids, "top"}
    outside = [a for a in outline.addresses if not a.startswith(("#", "data:")) and a != "report.json"]
    assert outside == []
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)


def test_the_same_record_gives_the_same_page(record, page):
    assert render(record) == page


def test_the_finding_comes_first_and_every_figure_has_a_title_and_follows_the_theme(record, page):
    assert f"<h1>{record['bias']['reading'][0]}</h1>" in page
    figures = re.findall(r'<svg class="figure".*?</svg>', page, flags=re.DOTALL)
    assert len(figures) == 8
    for figure in figures:
        assert re.search(r'aria-labelledby="(\S+)-title" .*<title id="\1-title">[A-Z][^<]+</title>', figure)
        assert "var(--ink)" in figure
        assert not re.search(r"#[0-9a-f]{6}\b", figure), "a colour that no theme changes"


def test_numbers_of_the_record_are_on_the_page(page):
    text = visible(page)
    command = "paraboloid inspect digits-cnn --seed 0"
    for expected in ("3,818", "16×8×3×3, 16", "1.74 ± 0.13", "98.3%", command):
        assert expected in text, expected


def test_what_a_user_named_is_escaped(record):
    record["problem"]["name"] = "<script>alert(1)</script>"
    record["problem"]["layers"][0]["name"] = "a<b&c"
    record["noise"]["checkpoints"] = [
        {**point, "layers": [{**layer, "name": layer["name"].replace("conv1", "a<b&c")} for layer in point["layers"]]}
        for point in record["noise"]["checkpoints"]
    ]
    for item in record["curvature"]["eigenvalues"]:
        item["layers"]["a<b&c"] = item["layers"].pop("conv1")
    record["curvature"]["layers"][0]["name"] = "a<b&c"
    page = render(record)
    assert "<script>alert" not in page
    assert "a<b" not in page
    assert not Outline(page).open


def no_accuracy(record):
    for point in record["training"]["curve"]:
        point["test_accuracy"] = None


def no_test_set(record):
    record["problem"]["test_size"] = None
    for point in record["training"]["curve"]:
        point.update(test_accuracy=None, test_loss=None)


def not_trained(record):
    record["training"].update(curve=record["training"]["curve"][:1], steps=0, epochs=0.0)
    record["noise"]["checkpoints"] = record["noise"]["checkpoints"][-1:]


def undefined_numbers(record):
    for point in record["noise"]["checkpoints"]:
        for entry in [point["total"], *point["layers"]]:
            entry.update({key: None for key in entry if key != "name"})
    for row in record["bias"]["table"]:
        for ratio in row["ratios"]:
            for quantity in ("curvature", "slope"):
                ratio[quantity] = {which: {"value": None, "standard_error": None} for which in ("same", "other")}
            ratio["slope_sum"] = {which: {"value": None, "standard_error": None} for which in ("same", "other", "full")}
        for which in row["decrease"].values():
            for entry in which.values():
                entry.update(value=None, standard_error=None)
    record["curvature"]["trace"].update(value=None, standard_error=None)
    for row in record["curvature"]["layers"]:
        row.update(trace=None, mean_diagonal=None)


def flat(record):
    for item in record["curvature"]["eigenvalues"]:
        item["value"] = 0.0
    for row in record["curvature"]["layers"]:
        row.update(trace=0.0, mean_diagonal=0.0)
    record["curvature"]["trace"]["value"] = 0.0
    record["curvature"]["density"] = None


def one_of_everything(record):
    record["problem"]["layers"] = record["problem"]["layers"][:1]
    for point in record["noise"]["checkpoints"]:
        point["layers"] = point["layers"][:1]
    record["noise"]["checkpoints"] = record["noise"]["checkpoints"][:1]
    record["training"]["curve"] = record["training"]["curve"][:1]
    record["curvature"]["layers"] = record["curvature"]["layers"][:1]
    record["curvature"]["eigenvalues"] = [{"value": 4.1, "layers": {"conv1": 1.0}}]
    bias = record["bias"]
    bias.update(k=1, repeats=1, table=bias["table"][:1], dropped=[64, 128])
    row = bias["table"][0]
    row["ratios"] = row["ratios"][:1]
    for quantity in ("curvature", "slope"):
        for values in row[quantity].values():
            values.update(mean=values["mean"][:1], standard_error=[None])


def many_layers(record):
    names = [f"blocks.{i}.attention.projection" for i in range(40)]
    record["problem"]["layers"] = [
        {
            "name": name,
            "kind": "Linear",
            "parameters": 100 + i,
            "tensors": [{"name": f"{name}.weight", "shape": [], "parameters": 100 + i}],
        }
        for i, name in enumerate(names)
    ]
    for point in record["noise"]["checkpoints"]:
        point["layers"] = [{**point["layers"][0], "name": name} for name in names]
    record["curvature"]["layers"] = [
        {"name": name, "trace": 1.0, "standard_error": 0.1, "mean_diagonal": 0.01} for name in names
    ]
    for item in record["curvature"]["eigenvalues"]:
        item["layers"] = dict.fromkeys(names, 1 / len(names))


CHANGES = [no_accuracy, no_test_set, not_trained, undefined_numbers, flat, one_of_everything, many_layers]


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_that_lacks_something_still_makes_a_whole_page(record, change):
    change(record)
    page = render(record)
    assert not Outline(page).open
    text = visible(page)
    assert "nan" not in text.lower().split()
    assert "None" not in text
    assert ("The 8 largest of 40 layers are shown" in text) == (change is many_layers)
