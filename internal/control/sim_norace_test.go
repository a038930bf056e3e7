//go:build !race

package control_test

// simSeeds of an ordinary test run.
const simSeeds = 120
