"""Says what the Python that runs this lacks to make the project's environment; silent if nothing.

Needs src on PYTHONPATH and nothing installed.
"""

import shutil
import sys

if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit("Python " + sys.version.split()[0] + " is not supported: install 3.10, 3.11 or 3.12")

try:
    import ensurepip  # noqa: F401
    import venv  # noqa: F401
except ImportError:
    sys.exit(sys.executable + " cannot make environments: on Debian and Ubuntu, apt install python3-venv")

if shutil.which("tritonserver") is None:
    # The server of the package that will be installed.
    import tempfile
    from pathlib import Path

    from trtforge.client.server_binary import link_libpython
    from trtforge.errors import TrtforgeError

    with tempfile.TemporaryDirectory() as scratch:
        try:
            link_libpython(Path(scratch, "lib"))
        except TrtforgeError as error:
            sys.exit(str(error))
