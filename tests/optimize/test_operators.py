"""The names of our custom operators."""

from __future__ import annotations

import pytest

from longcat_core.optimize.operators import NAMESPACE, namespace_of


@pytest.mark.parametrize("folder", ["longcat-video", "Jürgen", "长猫", "no\udcffutf", "a b%d"])
def test_pytorch_takes_the_namespace_of_a_pack_in_any_folder(folder):
    found = namespace_of(f"/{folder}/custom_nodes/longcat-video.longcat_core.optimize.operators")
    assert found.isascii() and found.isidentifier() and found.startswith("longcat_")


def test_folders_have_namespaces_of_their_own():
    assert NAMESPACE == namespace_of("longcat_core.other") == "longcat"
    assert len({namespace_of(f"{name}.longcat_core.x") for name in ("长猫", "龙猫", "ü", "u")}) == 4
