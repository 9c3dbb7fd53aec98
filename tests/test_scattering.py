"""The scattering transform against convolutions written out, against laws, and against Kymatio's numbers."""
