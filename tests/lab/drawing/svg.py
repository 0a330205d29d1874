"""Reading pictures back: boxes of texts, as the picture estimates them."""

from itertools import combinations

from blockwright.lab.drawing.sheet import width

SVG = "{http://www.w3.org/2000/svg}"
SIZES = {"title": 17.0, "figure": 13.0, "name": 12.0, "small": 10.0}


def texts(root):
    """Each text, and its box: left, top, right, bottom."""
    for element in root.iter(f"{SVG}text"):
        classes = set((element.get("class") or "").split())
        size = next((SIZES[c] for c in classes if c in SIZES), 11.0)
        wide = width(element.text or "", size, bool(classes & {"title", "figure", "name", "letter"}))
        x, y = float(element.attrib["x"]), float(element.attrib["y"])
        left = x - wide if "end" in classes else x - wide / 2 if classes & {"mid", "letter"} else x
        yield element.text or "", (left, y - 0.75 * size, left + wide, y + 0.2 * size)


def overlaps(boxes):
    """Pairs of texts whose boxes meet."""
    filled = [(text, box) for text, box in boxes if text]
    return [(a, b) for (a, p), (b, q) in combinations(filled, 2) if _meet(p, q)]


def _meet(p, q):
    return p[0] < q[2] and q[0] < p[2] and p[1] < q[3] and q[1] < p[3]


def outside(root, boxes):
    """Texts that leave the sheet."""
    _, _, wide, high = map(float, root.attrib["viewBox"].split())
    return [text for text, (x0, y0, x1, y1) in boxes if x0 < 0 or y0 < 0 or x1 > wide or y1 > high]


def groups(root):
    """Path → the element of its box."""
    return {g.attrib["data-path"]: g for g in root.iter(f"{SVG}g") if "data-path" in g.attrib}
