"""Where residuals are when their block does not compute, and how they come to the device."""
