"""Images: classifiers trained by the paper's recipe on timm's parts, evaluated, used, and compared with each other."""
