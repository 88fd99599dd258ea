"""Tasks that share a row: even groups, by seed and step, and the methods they do not suit."""

from __future__ import annotations

import pytest

from taskmoe.moe.config import ConfigError
from taskmoe.train.surgery.choose import choose
from taskmoe.train.surgery.rows import check_rows, check_tasks, fold


def test_fold_is_even_and_a_function_of_seed_and_step():
    assert fold([7, 3, 3], 2, 0, 0) == {3: 0, 7: 1}
    rows = fold(range(10), 4, 1, 2)
    assert rows == fold(range(10), 4, 1, 2) != fold(range(10), 4, 1, 3)
    sizes = [list(rows.values()).count(r) for r in range(4)]
    assert sorted(sizes) == [2, 2, 3, 3]


def test_methods_that_go_by_task_need_a_row_for_each():
    for name, options in (("gradvac", {}), ("fixed", {"weights": [1.0] * 5})):
        method = choose(name, options)
        check_tasks(method, 5, 5)
        with pytest.raises(ConfigError, match=r"surgery.max_tasks: 4, but there are 5 tasks.*set it to 5"):
            check_tasks(method, 5, 4)
        check_rows(method, [[0], [1]])
        with pytest.raises(ConfigError, match=r"surgery.max_tasks: 2, but .* set it to 3"):
            check_rows(method, [[0, 2], [1]])
    check_tasks(choose("pcgrad"), 5, 4)


def test_fixed_weights_are_as_many_as_the_tasks():
    for n in (2, 4):
        with pytest.raises(ConfigError, match=rf"surgery.options.weights: {n} weights for 3 tasks"):
            check_tasks(choose("fixed", {"weights": [1.0] * n}), 3, 16)
