//! Where a network card's packets go: the NetBackend contract and the tap.
