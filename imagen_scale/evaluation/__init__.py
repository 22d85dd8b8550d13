"""How good a trained cascade is: measures, what they are measured on, and how they are told."""

from imagen_scale.sampling.measures import psnr_db as psnr_db
from imagen_scale.sampling.measures import retrieval_accuracy as retrieval_accuracy
