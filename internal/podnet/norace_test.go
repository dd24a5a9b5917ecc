//go:build !race

package podnet

const raceEnabled = false
