"""What Kubernetes accepts as a name, the value of a label, a variable and a quantity."""

from __future__ import annotations

import re

DNS = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
QUANTITY = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(m|[kMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?")
LONGEST = 63  # letters of a host name; pods are named NAME-node-0-INDEX
SUFFIX = "-abcde"  # a Job adds such a one to the names of its pods
ANNOTATIONS = 262_144  # bytes of all together


def amount(quantity: str) -> float:
    """A quantity as a number: 500m → 0.5, 1Ki → 1024."""
    number, unit = re.fullmatch(r"([+-]?[0-9.]+)([a-zA-Z]*)", quantity.replace("e+", "e").split("e")[0]).groups()  # type: ignore[union-attr]
    if "e" in quantity.lower().rstrip("i") and not unit:
        return float(quantity)
    if unit == "m":
        return float(number) / 1000
    power = "kMGTPE".find(unit[:1].replace("K", "k")) + 1 if unit else 0
    return float(number) * (1024 if unit.endswith("i") else 1000) ** power
