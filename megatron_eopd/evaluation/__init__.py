"""How good a model is: estimators over graded samples."""
