"""python -m tpmodel_worker.updater."""

from tpmodel_worker.updater.command import main

main()
