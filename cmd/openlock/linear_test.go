package main

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/anishathalye/porcupine"
	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/device"
	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
)

// recorder keeps what clients saw, with a clock that only counts: two calls
// overlap if and only if each began before the other had returned.
type recorder struct {
	clock atomic.Int64
	mu    sync.Mutex
	all   []porcupine.Operation
}

func (h *recorder) call(client int, in any, do func() any) {
	begun := h.clock.Add(1)
	out := do()
	returned := h.clock.Add(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all = append(h.all, porcupine.Operation{ClientId: client, Input: in, Call: begun, Output: out, Return: returned})
}

// judge fails the test unless the history could have been made by one call
// after the other, each at some moment between its begin and its return.
func judge(t *testing.T, m porcupine.Model, history []porcupine.Operation) {
	t.Helper()
	if verdict := porcupine.CheckOperationsTimeout(m, history, patience); verdict != porcupine.Ok {
		slices.SortFunc(history, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
		var b strings.Builder
		for _, o := range history {
			fmt.Fprintf(&b, "[%4d,%4d] client %d: %+v -> %+v\n", o.Call, o.Return, o.ClientId, o.Input, o.Output)
		}
		t.Errorf("%s: no order of these calls explains their answers:\n%s", verdict, &b)
	}
}

// byInput splits a history into independent ones.
func byInput[K comparable](key func(in any) K) func([]porcupine.Operation) [][]porcupine.Operation {
	return func(history []porcupine.Operation) (parts [][]porcupine.Operation) {
		place := map[K]int{}
		for _, o := range history {
			k := key(o.Input)
			if _, known := place[k]; !known {
				place[k] = len(parts)
				parts = append(parts, nil)
			}
			parts[place[k]] = append(parts[place[k]], o)
		}
		return parts
	}
}

// A lock, as its callers know it: an owner, one key's holder, and a version
// that every change raises. Outcomes, which no caller asks for, raise it too.
type (
	lockState struct {
		version    int64
		owner, key string
	}
	lockCall struct{ do, to string } // open, owner, key or read
	lockSaid struct {
		version    int64
		changed    bool
		owner, key string // of a read
	}
)

var lockModel = porcupine.Model{
	Init: func() any { return lockState{version: 1} },
	Step: func(state, in, out any) (bool, any) {
		s, call, said := state.(lockState), in.(lockCall), out.(lockSaid)
		before := s
		switch call.do {
		case "owner":
			s.owner = call.to
		case "key":
			s.key = call.to
		case "read":
			s.version = said.version
			return said.version >= before.version && said.owner == s.owner && said.key == s.key, s
		}
		s.version = said.version
		if changes := call.do == "open" || before.owner != s.owner || before.key != s.key; changes {
			return said.changed && said.version > before.version, s
		}
		return !said.changed && said.version >= before.version, s
	},
}

func (r *rig) callLock(c creds, call lockCall) lockSaid {
	var a reply
	var err error
	switch call.do {
	case "open":
		a, err = r.try("POST", openPath(1), c, nil)
	case "owner":
		a, err = r.try("POST", "/locks/1/SetOwner", c, map[string]any{"userId": call.to})
	case "key":
		a, err = r.try("POST", "/locks/1/AddKey", c, map[string]any{"keyUuid": "k", "keyIndexNumber": 1, "userId": call.to})
	case "read":
		a, err = r.try("GET", "/locks/1/details", c, nil)
	}
	if err != nil || a.status != http.StatusOK {
		r.t.Errorf("%+v: %d %v %s", call, a.status, err, a.raw)
		return lockSaid{}
	}
	version, _ := a.get("version").(float64)
	said := lockSaid{version: int64(version), changed: a.get("event") != nil}
	said.owner, _ = a.get("ownerId").(string)
	if keys, _ := a.get("keys").([]any); len(keys) > 0 {
		said.key, _ = keys[0].(map[string]any)["userId"].(string)
	}
	return said
}

// Whatever callers do to a lock at the same time, there is one order of it, the
// order of the versions that they are told.
func TestALockIsLinearizable(t *testing.T) {
	const clients, calls = 6, 40
	r := newRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	r.device(1)
	var h recorder
	var wg sync.WaitGroup
	for client := range clients {
		wg.Go(func() {
			for n := range calls {
				call := lockCall{do: []string{"open", "owner", "read", "key", "read"}[(n+client)%5]}
				if call.do == "owner" || call.do == "key" {
					call.to = "user-" + strconv.Itoa(n%2)
				}
				h.call(client, call, func() any { return r.callLock(acme, call) })
			}
		})
	}
	wg.Wait()
	judge(t, lockModel, h.all)
	r.restart() // ends what is unfinished
	log := audit(t, r.db, 1)
	types := map[int64]string{}
	for _, e := range everything(t, r.db, 1) {
		types[e.Version] = e.Type
	}
	for _, o := range h.all {
		want := map[string]string{"open": "LockOpenRequested", "owner": "OwnerSet", "key": "KeyAdded"}[o.Input.(lockCall).do]
		if said := o.Output.(lockSaid); said.changed && types[said.version] != want {
			t.Errorf("%+v was told %+v, the log has %s there", o.Input, said, types[said.version])
		}
	}
	t.Logf("%d calls of %d clients on one lock, %d versions: linearizable", len(h.all), clients, log.version)
}

// requestIDs names commands: the first open with a requestId makes its command,
// every later one is told of it. Without forgetting, that holds for good; with
// it, a fresh command may take the place of one that has ended.
func requestIDs(forgets bool) porcupine.Model {
	return porcupine.Model{
		Partition: byInput(func(in any) string { return in.(string) }),
		Init:      func() any { return "" },
		Step: func(state, _, out any) (bool, any) {
			is, said := state.(string), out.(openSaid)
			if said.replayed {
				return is != "" && said.command == is, is
			}
			return said.command != "" && (is == "" || forgets && said.command != is), said.command
		},
	}
}

type openSaid struct {
	command  string
	replayed bool
}

func TestARequestIDIsLinearizable(t *testing.T) {
	const clients, calls, ids = 8, 24, 6
	for _, forgets := range []bool{false, true} {
		r := newRig(t, func(c *config) {
			if forgets {
				c.settings.Window = 1 // nothing is remembered beyond the outcome
			}
		})
		acme := r.org("acme")
		r.createLock(1, acme)
		movements := r.watched(1)
		var h recorder
		var wg sync.WaitGroup
		for client := range clients {
			wg.Go(func() {
				for n := range calls {
					id := "r-" + strconv.Itoa((n*(client+1))%ids)
					h.call(client, id, func() any {
						a, err := r.try("POST", openPath(1), acme, map[string]any{"requestId": id})
						if err != nil || a.status != http.StatusOK {
							t.Errorf("open: %d %v %s", a.status, err, a.raw)
						}
						command, replayed := opened(a)
						return openSaid{command, replayed}
					})
				}
			})
		}
		wg.Wait()
		judge(t, requestIDs(forgets), h.all)
		r.restart()
		log := audit(t, r.db, 1)
		checkDoor(t, log, movements())
		windows(t, log)
		if n := len(log.requested); n < ids || !forgets && n != ids {
			t.Errorf("forgets: %t, %d requestIds made %d commands", forgets, ids, n)
		}
		t.Logf("forgets: %t, %d opens of %d clients with %d requestIds, %d commands: linearizable", forgets, len(h.all), clients, ids, len(log.requested))
	}
}

// windows holds that no command took a requestId from one that had not ended.
func windows(t *testing.T, h history) {
	t.Helper()
	for one, first := range h.requested {
		for other, next := range h.requested {
			same := first.Meta.Request == next.Meta.Request && first.Version < next.Version
			if same && h.ended[one].Version > next.Version {
				t.Errorf("requestId %s: %s is recorded at %d, before %s has ended at %d",
					next.Meta.Request, other, next.Version, one, h.ended[one].Version)
			}
		}
	}
}

// Rights that are taken and given while they are used: an open succeeds if and
// only if, at its moment, the right stands.
type rightCall struct{ of, do string } // do is open, revoke or restore

var rights = porcupine.Model{
	Partition: byInput(func(in any) string { return in.(rightCall).of }),
	Init:      func() any { return true },
	Step: func(state, in, out any) (bool, any) {
		switch in.(rightCall).do {
		case "revoke":
			return out == nil, false
		case "restore":
			return out == nil, true
		}
		want := http.StatusOK
		if !state.(bool) {
			want = http.StatusUnauthorized
		}
		return out.(int) == want, state
	},
}

// tries is one caller who opens again and again, over several connections.
type tries struct {
	name    string
	creds   creds
	answers chan int // one for each open; whoever changes the right reads them
	stop    chan struct{}
	wg      sync.WaitGroup
}

func (r *rig) keepTrying(h *recorder, name string, c creds) *tries {
	x := &tries{name: name, creds: c, answers: make(chan int), stop: make(chan struct{})}
	for client := range 3 {
		x.wg.Go(func() {
			for {
				var status int
				h.call(client, rightCall{name, "open"}, func() any {
					a, err := r.try("POST", openPath(1), c, nil)
					if err != nil {
						r.t.Error(err)
					}
					status = a.status
					return status
				})
				select {
				case x.answers <- status:
				case <-x.stop:
					return
				}
			}
		})
	}
	return x
}

// change takes or gives the right after some answers.
func (x *tries) change(h *recorder, do string, change func() error) {
	for range 5 {
		<-x.answers
	}
	h.call(3, rightCall{x.name, do}, func() any { return change() })
}

func (x *tries) end() {
	for range 5 {
		<-x.answers
	}
	close(x.stop)
	x.wg.Wait()
}

// A right that is revoked authorises nothing from the moment at which whoever
// revoked it is told so, neither by the answers nor by the log.
func TestARevocationIsLinearizable(t *testing.T) {
	const keys, suspensions = 25, 12
	r := newRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	movements := r.watched(1)
	var h recorder
	var past event.Position
	silent := map[string]event.Position{} // credential: nothing of it may come later
	for n := range keys {
		secret, c, err := r.registry.Create(t.Context(), auth.NewCredential{Kind: store.APIKey, Org: "acme"})
		r.must(err)
		x := r.keepTrying(&h, "key-"+strconv.Itoa(n), creds{key: secret})
		x.change(&h, "revoke", func() error {
			err := r.registry.Revoke(t.Context(), store.APIKey, "acme", c.ID)
			past = r.endAfter(past)
			silent["key:"+c.ID] = past
			return err
		})
		x.end()
	}
	user, token := r.user()
	r.want(r.send("POST", "/locks/1/SetOwner", acme, map[string]any{"userId": user}), http.StatusOK)
	x := r.keepTrying(&h, "user", token)
	for range suspensions {
		x.change(&h, "revoke", func() error {
			err := r.registry.SuspendUser(t.Context(), user)
			past = r.endAfter(past)
			return err
		})
		x.change(&h, "restore", func() error {
			r.noOpenBy(user, past)
			return r.registry.ReactivateUser(t.Context(), user)
		})
	}
	x.end()
	judge(t, rights, h.all)
	for _, e := range everything(t, r.db, 1) {
		if end, revoked := silent[e.Meta.Credential]; revoked && e.Position > end {
			t.Errorf("%s of %s is recorded at %d; it was revoked at %d", e.Type, e.Meta.Credential, e.Position, end)
		}
	}
	seen := map[any]int{}
	for _, o := range h.all {
		seen[o.Output]++
	}
	r.restart()
	log := audit(t, r.db, 1)
	checkDoor(t, log, movements())
	if granted := seen[http.StatusOK]; granted < keys || seen[http.StatusUnauthorized] < keys || granted != len(log.requested) {
		t.Errorf("%d opens in the log; answers: %v", len(log.requested), seen)
	}
	t.Logf("%d keys revoked, one user suspended %d times; %d opens granted, %d refused: linearizable",
		keys, suspensions, seen[http.StatusOK], seen[http.StatusUnauthorized])
}

// endAfter is the log's end, which lies at or after a position.
func (r *rig) endAfter(p event.Position) event.Position {
	for {
		more, err := r.db.After(r.t.Context(), p, 1000)
		r.must(err)
		if len(more) == 0 {
			return p
		}
		p = more[len(more)-1].Position
	}
}

func (r *rig) noOpenBy(user string, after event.Position) {
	r.t.Helper()
	records, err := r.db.After(r.t.Context(), after, 1000)
	r.must(err)
	for _, e := range records {
		if e.Meta.Actor == "user:"+user {
			r.t.Errorf("%s of a suspended user is recorded at %d, after %d", e.Type, e.Position, after)
		}
	}
}

// watched runs a door; the answer stops it and tells how it has moved.
func (r *rig) watched(id lock.ID) (movements func() []device.Event) {
	d, moved, stop := r.device(id), make(chan []device.Event), make(chan struct{})
	go func() { moved <- d.collect(stop) }()
	return func() []device.Event {
		d.stop()
		close(stop)
		return <-moved
	}
}

// The models can tell a bad history from a good one.
func TestTheModelsConvict(t *testing.T) {
	op := func(begin, end int64, in, out any) porcupine.Operation {
		return porcupine.Operation{Input: in, Output: out, Call: begin, Return: end}
	}
	open, owner, read := lockCall{do: "open"}, lockCall{"owner", "u"}, lockCall{do: "read"}
	revoke, use := rightCall{"k", "revoke"}, rightCall{"k", "open"}
	for name, c := range map[string]struct {
		model porcupine.Model
		want  porcupine.CheckResult
		ops   []porcupine.Operation
	}{
		"versions rise":         {lockModel, porcupine.Ok, []porcupine.Operation{op(1, 2, open, lockSaid{2, true, "", ""}), op(3, 4, open, lockSaid{4, true, "", ""})}},
		"a version twice":       {lockModel, porcupine.Illegal, []porcupine.Operation{op(1, 4, open, lockSaid{2, true, "", ""}), op(2, 3, open, lockSaid{2, true, "", ""})}},
		"versions fall":         {lockModel, porcupine.Illegal, []porcupine.Operation{op(1, 2, open, lockSaid{3, true, "", ""}), op(3, 4, open, lockSaid{2, true, "", ""})}},
		"they may if at once":   {lockModel, porcupine.Ok, []porcupine.Operation{op(1, 4, open, lockSaid{3, true, "", ""}), op(2, 3, open, lockSaid{2, true, "", ""})}},
		"a stale read":          {lockModel, porcupine.Illegal, []porcupine.Operation{op(1, 2, owner, lockSaid{2, true, "", ""}), op(3, 4, read, lockSaid{1, false, "", ""})}},
		"the same owner again":  {lockModel, porcupine.Illegal, []porcupine.Operation{op(1, 2, owner, lockSaid{2, true, "", ""}), op(3, 4, owner, lockSaid{3, true, "", ""})}},
		"one command":           {requestIDs(false), porcupine.Ok, []porcupine.Operation{op(1, 4, "r", openSaid{"c", true}), op(2, 3, "r", openSaid{"c", false})}},
		"two commands":          {requestIDs(false), porcupine.Illegal, []porcupine.Operation{op(1, 4, "r", openSaid{"c", false}), op(2, 3, "r", openSaid{"d", false})}},
		"two after forgetting":  {requestIDs(true), porcupine.Ok, []porcupine.Operation{op(1, 2, "r", openSaid{"c", false}), op(3, 4, "r", openSaid{"d", false})}},
		"another's command":     {requestIDs(true), porcupine.Illegal, []porcupine.Operation{op(1, 2, "r", openSaid{"c", false}), op(3, 4, "r", openSaid{"d", true})}},
		"repeat before first":   {requestIDs(true), porcupine.Illegal, []porcupine.Operation{op(1, 2, "r", openSaid{"c", true}), op(3, 4, "r", openSaid{"c", false})}},
		"two requestIds":        {requestIDs(false), porcupine.Ok, []porcupine.Operation{op(1, 2, "r", openSaid{"c", false}), op(3, 4, "s", openSaid{"d", false})}},
		"refused once revoked":  {rights, porcupine.Ok, []porcupine.Operation{op(1, 2, use, 200), op(3, 6, revoke, nil), op(4, 5, use, 200), op(7, 8, use, 401)}},
		"opened though revoked": {rights, porcupine.Illegal, []porcupine.Operation{op(1, 2, revoke, nil), op(3, 4, use, 200)}},
		"refused, then opened":  {rights, porcupine.Illegal, []porcupine.Operation{op(1, 6, revoke, nil), op(2, 3, use, 401), op(4, 5, use, 200)}},
		"refused too early":     {rights, porcupine.Illegal, []porcupine.Operation{op(1, 2, use, 401), op(3, 4, revoke, nil)}},
	} {
		if got := porcupine.CheckOperationsTimeout(c.model, c.ops, patience); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}
