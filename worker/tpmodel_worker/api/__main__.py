"""Runs an api process: python -m tpmodel_worker.api --settings-file FILE --index I."""

from tpmodel_worker.api.main import main

main()
