"""Figures of runs and studies, all in one style. Imports neither torch nor MPI."""
