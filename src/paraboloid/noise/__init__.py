"""Gradient noise: estimators, clustering, stratified batches; imports from `quantities` and below.

clusters = pb.noise.GradientClustering(model, loss_fn, num_clusters=10).fit(dataset)
sampler = pb.noise.StratifiedBatchSampler(clusters.assignments)
noise = pb.noise.compare(model, loss_fn, dataset, batch_size=10)
"""

from paraboloid.noise.centres import Centres
from paraboloid.noise.clustering import GradientClustering
from paraboloid.noise.comparison import Comparison, NoiseMeasure, compare
from paraboloid.noise.detection import Members, duplicates, members, precision_at, suspicion
from paraboloid.noise.estimators import GC, SGB, SVRG, Estimator, Sampled, Stratified
from paraboloid.noise.expectation import Strata, strata
from paraboloid.noise.gradients import Gradients
from paraboloid.noise.monitor import Monitor, Reclustering, Snapshots
from paraboloid.noise.noise_scale import Measures, Noise, measures
from paraboloid.noise.sampler import StratifiedBatchSampler

__all__ = [
    "GC", "SGB", "SVRG", "Centres", "Comparison", "Estimator", "GradientClustering", "Gradients", "Measures", "Members",
    "Monitor", "Noise", "NoiseMeasure", "Reclustering", "Sampled", "Snapshots", "Strata", "Stratified",
    "StratifiedBatchSampler", "compare", "duplicates", "measures", "members", "precision_at", "strata", "suspicion",
]  # fmt: skip
