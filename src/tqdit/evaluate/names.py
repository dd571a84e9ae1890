"""What the metrics are called, in a command, in JSON and for people. Imports nothing."""

METRICS = ("frechet_distance", "spatial_frechet_distance", "inception_score", "precision", "recall", "accuracy")
TITLES = {
    "frechet_distance": "Frechet distance",
    "spatial_frechet_distance": "spatial Frechet distance",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "recognised",
    "frechet_excess": "Frechet distance above float",
    "final_error": "same-noise error of x_0",
    "final_error_median": "same-noise error of x_0, median",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
}
# What Inception makes of them has names that papers use.
INCEPTION_TITLES = {"frechet_distance": "FID", "spatial_frechet_distance": "sFID"}
SETS = {"subject": "this engine", "float": "float, same noise", "samples": "samples"}
