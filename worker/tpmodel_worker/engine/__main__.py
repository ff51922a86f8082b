"""python -m tpmodel_worker.engine --settings-file FILE."""

import sys

from tpmodel_worker.engine.main import main

sys.exit(main())
