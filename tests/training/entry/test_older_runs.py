"""What older runs have left is taken as it is: their configuration, under names that have changed since."""

from __future__ import annotations

from blockwright.renamed import MOVED, with_moved
from blockwright.training.configuration.instantiate import find_target


def test_class_that_has_moved_is_found_where_a_node_names_it_and_nowhere_else() -> None:
    for old, new in MOVED.items():
        assert find_target(new, "x").__name__ == old.rpartition(".")[2]
        given = {"model": {"class_path": old, "init_args": {"text": old}}, "x": [{"_target_": old}], "y": ["z", None]}
        moved = {"model": {"class_path": new, "init_args": {"text": old}}, "x": [{"_target_": new}], "y": ["z", None]}
        assert with_moved(given) == moved
