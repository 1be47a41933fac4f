"""What import-linter's contracts do not say: no module leads back to itself."""

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest


def test_there_is_no_import_circle() -> None:
    graph = grimp.build_graph("bridge", "workers")
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
