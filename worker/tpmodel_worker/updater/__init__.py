"""`tpmodel-weight-updater`: runs beside a gang and lets a trainer of the indexed way in."""
