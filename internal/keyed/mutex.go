// Package keyed serialises work that concerns one thing without holding up
// work on others.
package keyed

import "sync"

// Mutex is a mutex for each key. The zero value is ready. It keeps nothing of
// keys that nobody holds or waits for.
type Mutex[K comparable] struct {
	mu   sync.Mutex
	held map[K]*entry
}

type entry struct {
	sync.Mutex
	users int
}

// Lock waits for a key and answers with what gives it free.
func (m *Mutex[K]) Lock(key K) (unlock func()) {
	m.mu.Lock()
	if m.held == nil {
		m.held = map[K]*entry{}
	}
	e := m.held[key]
	if e == nil {
		e = &entry{}
		m.held[key] = e
	}
	e.users++
	m.mu.Unlock()
	e.Lock()
	return func() {
		e.Unlock()
		m.mu.Lock()
		defer m.mu.Unlock()
		if e.users--; e.users == 0 {
			delete(m.held, key)
		}
	}
}
