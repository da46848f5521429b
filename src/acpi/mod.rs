//! ACPI as the guest sees it: tables, the DSDT's devices, the Generic Event Device, power.
