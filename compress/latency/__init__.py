"""The time of a run on this machine, measured part by part and predicted from there."""

from compress.latency.geometry import Geometry, geometry_of
from compress.latency.model import LatencyModel, standard_workloads
from compress.latency.parts import Workload

__all__ = ["Geometry", "LatencyModel", "Workload", "geometry_of", "standard_workloads"]
