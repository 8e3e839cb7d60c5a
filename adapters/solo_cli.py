"""``climb-solo``: runs a solo-learn script with CLIMB in its methods.

``climb-solo SCRIPT [ARGS...]`` is ``python SCRIPT [ARGS...]`` after
:func:`climb_plugin.adapters.solo_learn.register`. Scripts that use Hydra find the plugin by
themselves; this is for those that do not, such as ``main_knn.py`` and ``main_umap.py``.

``climb-solo knn [ARGS...]`` evaluates a checkpoint with k-NN on any device.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

USAGE = """\
climb-solo SCRIPT [ARGS...]   run a solo-learn script with CLIMB in its methods
climb-solo knn [ARGS...]      k-NN of a checkpoint on CPU or GPU; climb-solo knn --help says more
"""


def main() -> None:
    """The console command."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE, end="")
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    command = sys.argv[1]
    if command == "knn":
        # A console command does not look for modules where it is called, as python -m does.
        sys.path.insert(0, str(Path.cwd()))
        from climb_plugin.adapters.solo_knn import main as knn

        knn(sys.argv[2:])
        return
    script = Path(command)
    if not script.is_file():
        raise SystemExit(f"climb-solo: there is no script {command!r} in {Path.cwd()}.")
    # As python does for a script: solo-learn's package lies beside its scripts.
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = sys.argv[1:]
    from climb_plugin.adapters.solo_learn import register

    register()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
