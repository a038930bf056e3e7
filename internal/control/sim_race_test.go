//go:build race

package control_test

// simSeeds of a run under the race detector, which is ten times slower and has
// little to find on one goroutine.
const simSeeds = 12
