package main

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/device"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
)

// opened is an answer's command and whether it was there before.
func opened(a reply) (command string, replayed bool) {
	command, _ = a.get("command", "id").(string)
	return command, a.header.Get("Idempotent-Replayed") == "true"
}

// fresh holds that an answer is a new command's, repeat that it is an old one's.
func (r *rig) fresh(a reply) (command string) {
	r.t.Helper()
	command, replayed := opened(r.want(a, http.StatusOK))
	if replayed || command == "" {
		r.t.Errorf("not a new command: %s", a.raw)
	}
	return command
}

func (r *rig) repeat(a, first reply) {
	r.t.Helper()
	command, replayed := opened(r.want(a, first.status))
	if was, _ := opened(first); !replayed || command != was || a.get("version") != first.get("version") ||
		fmt.Sprint(a.get("event")) != fmt.Sprint(first.get("event")) {
		r.t.Errorf("not a repetition of\n%s:\n%s", first.raw, a.raw)
	}
}

// requests counts the opens that were recorded of a lock.
func (r *rig) requests(id lock.ID) (n int) {
	for _, e := range everything(r.t, r.db, id) {
		if e.Type == "LockOpenRequested" {
			n++
		}
	}
	return n
}

// opensAt opens and waits until it is known how that ended.
func (r *rig) opensAt(id lock.ID, c creds, body string, headers ...string) reply {
	r.t.Helper()
	return r.send("POST", openPath(id), c, body, append([]string{"Prefer", "wait=20"}, headers...)...)
}

func TestConcurrentRepeatsAreOneCommand(t *testing.T) {
	for name, headers := range map[string][]string{"requestId": nil, "both": {"Idempotency-Key", "k"}} {
		r := discreetRig(t)
		acme := r.org("acme")
		r.createLock(1, acme)
		d := r.device(1)
		answers := make([]reply, 50)
		var wg sync.WaitGroup
		start := make(chan struct{})
		for i := range answers {
			wg.Go(func() {
				<-start
				a, err := r.try("POST", openPath(1), acme, `{"requestId":"once","reason":"x"}`, append([]string{"Prefer", "wait=20"}, headers...)...)
				if err != nil {
					t.Error(err)
				}
				answers[i] = a
			})
		}
		close(start)
		wg.Wait()
		first := 0
		for _, a := range answers {
			command, replayed := opened(r.want(a, http.StatusOK))
			if !replayed {
				first++
			}
			if want, _ := opened(answers[0]); command != want || a.get("version") != 2.0 || a.get("command", "outcome") != "opened" {
				t.Errorf("%s: %s", name, a.raw)
			}
		}
		d.await(device.Opened)
		if n := d.openings(); first != 1 || n != 0 || r.requests(1) != 1 {
			t.Errorf("%s: %d new commands, %d more openings, %d records", name, first, n, r.requests(1))
		}
		audit(t, r.db, 1)
	}
}

// The caller is organisation and actor; everybody else's requestId is another.
func TestARequestIDBelongsToItsCallerAndItsLock(t *testing.T) {
	r := discreetRig(t)
	acme, beta, super := r.org("acme"), r.org("beta"), r.super()
	owner, user := r.user()
	_, other := r.user()
	_, service := r.service("acme")
	r.want(r.send("POST", "/locks/1/CreateLock", acme, map[string]any{"index": 1, "uuid": "u1", "ownerId": owner}), http.StatusCreated)
	r.createLock(2, acme)
	r.createLock(3, beta)
	for id := range lock.ID(3) {
		r.device(id + 1)
	}
	const body = `{"requestId":"the same"}`
	commands := map[string]string{}
	for name, c := range map[string]struct {
		lock lock.ID
		creds
	}{
		"organization":               {1, acme},
		"its other lock":             {2, acme},
		"another organization":       {3, beta},
		"owner":                      {1, user},
		"service":                    {1, service},
		"organization, for the user": {1, creds{acme.key, user.token}},
		"organization, for another":  {1, creds{acme.key, other.token}},
		"super key":                  {1, super},
		"super key, for the user":    {1, creds{super.key, user.token}},
		"super key, other lock":      {3, super},
	} {
		a := r.opensAt(c.lock, c.creds, body)
		command := r.fresh(a)
		if before := commands[command]; before != "" {
			t.Errorf("%s is answered with the command of %s", name, before)
		}
		commands[command] = name
		r.repeat(r.opensAt(c.lock, c.creds, body), a)
	}
	if n := r.requests(1) + r.requests(2) + r.requests(3); n != len(commands) {
		t.Errorf("%d commands were recorded, want %d", n, len(commands))
	}
}

func TestAnotherCredentialIsTheSameCaller(t *testing.T) {
	r := discreetRig(t)
	first := r.org("acme")
	secret, made := r.credential("acme", store.APIKey)
	key := creds{key: secret}
	r.createLock(1, first)
	r.device(1)
	a := r.opensAt(1, key, `{"requestId":"r"}`, "Idempotency-Key", "k")
	r.fresh(a)
	successor, _, err := r.registry.Rotate(t.Context(), store.APIKey, "acme", made.ID, 0)
	r.must(err)
	r.want(r.send("POST", openPath(1), key, `{"requestId":"r"}`), http.StatusUnauthorized)
	r.repeat(r.send("POST", openPath(1), creds{key: successor}, `{"requestId":"r"}`), a)
	r.repeat(r.send("POST", openPath(1), first, `{"requestId":"r"}`, "Idempotency-Key", "k"), a)
	id, user := r.user()
	r.want(r.send("POST", "/locks/1/SetOwner", first, map[string]any{"userId": id}), http.StatusOK)
	b := r.opensAt(1, user, `{"requestId":"r"}`)
	r.fresh(b)
	r.repeat(r.send("POST", openPath(1), r.tokenOf(id), `{"requestId":"r"}`), b)
}

func TestARepeatIsAuthorisedAfresh(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.org("beta")
	r.one(acme)
	r.device(1)
	holder, owner := r.tokenOf(holderOfOne), r.tokenOf(ownerOfOne)
	key, made := r.credential("acme", store.APIKey)
	for _, c := range []struct {
		what string
		creds
		lose   func()
		status int
	}{
		{"key taken away", holder, func() { r.want(r.send("POST", "/locks/1/RemoveKey", acme, `{"keyUuid":"key-of-1"}`), http.StatusOK) }, http.StatusForbidden},
		{"credential revoked", creds{key: key}, func() { r.must(r.registry.Revoke(t.Context(), store.APIKey, "acme", made.ID)) }, http.StatusUnauthorized},
		{"lock given away", acme, func() { r.want(r.send("POST", "/locks/1/SetOrganization", acme, `{"orgId":"beta"}`), http.StatusOK) }, http.StatusForbidden},
		{"user suspended", owner, func() { r.must(r.registry.SuspendUser(t.Context(), ownerOfOne)) }, http.StatusUnauthorized},
	} {
		body, headers := `{"requestId":"`+c.what+`"}`, []string{"Idempotency-Key", c.what}
		first := r.opensAt(1, c.creds, body, headers...)
		r.fresh(first)
		r.repeat(r.send("POST", openPath(1), c.creds, body, headers...), first)
		c.lose()
		r.refused(c.what, c.status, func() reply {
			a := r.send("POST", openPath(1), c.creds, body, headers...)
			command, replayed := opened(a)
			if command != "" || replayed {
				t.Errorf("%s: is told of %s", c.what, a.raw)
			}
			return a
		})
	}
}

func TestAnIdempotencyKeyIsForOneRequestOfTheCallersWholeAPI(t *testing.T) {
	r := discreetRig(t)
	acme, super := r.org("acme"), r.super()
	send := func(c creds, call, body, key string) reply {
		return r.send("POST", "/locks/"+call, c, body, "Idempotency-Key", key)
	}
	created := send(acme, "1/CreateLock", `{"index":1,"uuid":"u"}`, "create")
	r.repeat(send(acme, "1/CreateLock", `{"index":1,"uuid":"u"}`, "create"), r.want(created, http.StatusCreated))
	nothing := send(acme, "1/SetOrganization", `{"orgId":"acme"}`, "nothing")
	added := send(acme, "1/AddKey", `{"keyUuid":"k"}`, "add")
	r.repeat(send(acme, "1/SetOrganization", `{"orgId":"acme"}`, "nothing"), r.want(nothing, http.StatusOK)) // as it was answered then
	r.want(send(acme, "1/RemoveKey", `{"keyUuid":"k"}`, "remove"), http.StatusOK)
	r.repeat(send(acme, "1/AddKey", `{"keyUuid":"k"}`, "add"), r.want(added, http.StatusOK)) // and the key stays away
	if a := r.send("GET", "/locks/1/details", acme, nil); len(a.get("keys").([]any)) != 0 {
		t.Errorf("a repetition has changed the lock: %s", a.raw)
	}
	r.createLock(2, acme)
	r.device(1)
	first := r.opensAt(1, acme, `{"reason":"x"}`, "Idempotency-Key", "open")
	r.fresh(first)
	for _, c := range []struct{ call, body, key string }{
		{"1/OpenLock", `{"reason":"y"}`, "open"},
		{"1/OpenLock", `{"reason": "x"}`, "open"}, // byte by byte
		{"1/OpenLock", ``, "open"},
		{"2/OpenLock", `{"reason":"x"}`, "open"},
		{"1/AddKey", `{"keyUuid":"k"}`, "open"},
		{"1/OpenLock", `{"reason":"x"}`, "add"},
		{"2/SetOrganization", `{"orgId":"acme"}`, "nothing"},
	} {
		r.refused(fmt.Sprint(c), http.StatusUnprocessableEntity, func() reply { return send(acme, c.call, c.body, c.key) })
	}
	r.repeat(send(acme, "1/OpenLock", `{"reason":"x"}`, "open"), first)
	r.fresh(r.opensAt(1, acme, `{"reason":"x"}`, "Idempotency-Key", "OPEN"))
	r.fresh(r.opensAt(1, super, `{"reason":"other"}`, "Idempotency-Key", "open")) // another caller
	// What was refused has used nothing up.
	r.want(send(acme, "1/RemoveKey", `{"keyUuid":"k"}`, "free"), http.StatusNotFound)
	r.want(send(acme, "1/AddKey", `{"keyUuid":"k"}`, "free"), http.StatusOK)
}

func TestEitherOfBothKeysMakesARepeat(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	r.device(1)
	open := func(body string, headers ...string) reply { return r.opensAt(1, acme, body, headers...) }
	first := open(`{"requestId":"r","reason":"x"}`, "Idempotency-Key", "k")
	r.fresh(first)
	r.repeat(open(`{"requestId":"r","reason":"x"}`), first)
	r.repeat(open(`{"requestId":"r","reason":"x"}`, "Idempotency-Key", "k"), first)

	// A key that came first with a repetition is remembered as well: alone, later,
	// it must not open again.
	r.repeat(open(`{"requestId":"r","reason":"x"}`, "Idempotency-Key", "later"), first)
	r.age("acme|org:acme", "request:1:r", 25*time.Hour)
	r.must(r.control.ForgetRepeats(t.Context()))
	r.repeat(open(`{"requestId":"r","reason":"x"}`, "Idempotency-Key", "later"), first)
	r.want(open(`{"requestId":"s"}`, "Idempotency-Key", "later"), http.StatusUnprocessableEntity)
	r.want(open(`{"requestId":"r","reason":"y"}`, "Idempotency-Key", "new"), http.StatusUnprocessableEntity)
	r.want(open(`{"requestId":"r"}`), http.StatusUnprocessableEntity)
	if n := r.requests(1); n != 1 {
		t.Errorf("%d commands", n)
	}
}

// age makes a remembered call one of longer ago.
func (r *rig) age(caller, key string, by time.Duration) {
	r.t.Helper()
	k, err := r.db.Repeat(r.t.Context(), store.RepeatKey{Caller: caller, Key: key})
	r.must(err)
	k.Replaces, k.CreatedAt = k.CreatedAt, k.CreatedAt.Add(-by)
	_, err = r.db.Commit(r.t.Context(), store.Change{Remember: []store.Repeat{k}})
	r.must(err)
}

func TestAnIdempotencyKeyLastsADay(t *testing.T) {
	r := discreetRig(t, func(c *config) { c.settings.Window = 0 })
	acme := r.org("acme")
	r.createLock(1, acme)
	r.device(1)
	open := func() reply { return r.opensAt(1, acme, `{}`, "Idempotency-Key", "k") }
	first := open()
	r.fresh(first)
	r.age("acme|org:acme", "header:k", 23*time.Hour+59*time.Minute)
	r.must(r.control.ForgetRepeats(t.Context()))
	r.repeat(open(), first)
	r.age("acme|org:acme", "header:k", 2*time.Minute)
	second := open() // though it is not swept away yet
	r.fresh(second)
	r.repeat(open(), second)
	r.age("acme|org:acme", "header:k", 25*time.Hour)
	r.must(r.control.ForgetRepeats(t.Context()))
	r.fresh(open())
}

func TestARequestIDIsTheSameCommandUntilItsWindowIsOver(t *testing.T) {
	r := discreetRig(t, func(c *config) { c.settings.Window = 0 })
	acme := r.org("acme")
	r.createLock(1, acme)
	r.createLock(2, acme)
	r.device(1, func(c *device.Config) { c.Faults.LoseAck = true }) // its command stays under way
	r.device(2)
	const body, other = `{"requestId":"r"}`, `{"requestId":"r","reason":"x"}`

	first := r.send("POST", openPath(1), acme, body)
	r.fresh(first)
	again := r.send("POST", openPath(1), acme, body)
	r.repeat(again, first)
	if again.get("command", "outcome") != "pending" {
		t.Errorf("answer %s", again.raw)
	}
	r.refused("another reason", http.StatusUnprocessableEntity, func() reply { return r.send("POST", openPath(1), acme, other) })

	r.fresh(r.opensAt(2, acme, body))
	r.fresh(r.opensAt(2, acme, other)) // the window is over with the outcome: for another reason, too
	if one, two := r.requests(1), r.requests(2); one != 1 || two != 2 {
		t.Errorf("%d and %d commands", one, two)
	}
}

func TestACommandThatWasNotSentMayBeTriedAgain(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	open := func() reply { return r.opensAt(1, acme, `{"requestId":"r"}`, "Idempotency-Key", "k") }
	commands := map[string]bool{}
	for range 2 {
		a := r.want(open(), http.StatusBadGateway)
		command, replayed := opened(a)
		if a.get("reason") != "not_sent" || replayed || commands[command] {
			t.Errorf("answer %s", a.raw)
		}
		commands[command] = true
	}
	d := r.device(1)
	first := open()
	if command := r.fresh(first); commands[command] || d.await(device.Opened).CommandID != command {
		t.Errorf("answer %s", first.raw)
	}
	d.stop()
	r.repeat(open(), first) // the door is offline now, yet this was done
	r.want(r.send("POST", openPath(1), acme, `{"requestId":"s"}`), http.StatusBadGateway)
	audit(t, r.db, 1)
}

// What is remembered tells how the command ended: also one that failed is not
// tried again by a repetition.
func TestARepeatAnswersWithTheFirstOutcome(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	r.device(1, func(c *device.Config) { c.Faults.Jam = true })
	first := r.send("POST", openPath(1), acme, `{"requestId":"r"}`)
	r.fresh(first)
	waited := r.opensAt(1, acme, `{"requestId":"r"}`)
	r.repeat(waited, first)
	if waited.get("command", "outcome") != "failed" || waited.get("command", "reason") != "jammed" || waited.header.Get("Preference-Applied") != "wait=20" {
		t.Errorf("answer %s", waited.raw)
	}
}

func TestARepeatIsKnownAfterARestart(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	_, user := r.user()
	both := creds{acme.key, user.token}
	r.createLock(1, acme)
	d := r.device(1)
	first := r.opensAt(1, both, `{"requestId":"r"}`, "Idempotency-Key", "k")
	r.fresh(first)
	d.await(device.Opened)
	d.stop()
	d = r.device(1, func(c *device.Config) { c.Faults.LoseAck = true })
	pending := r.send("POST", openPath(1), both, `{"requestId":"p"}`)
	command := r.fresh(pending)
	d.await(device.Opened)
	d.stop()
	r.restart()
	d = r.device(1)
	r.repeat(r.send("POST", openPath(1), both, `{"requestId":"r"}`), first)
	again := r.send("POST", openPath(1), both, `{"requestId":"r"}`, "Idempotency-Key", "k")
	r.repeat(again, first)
	if again.get("command", "outcome") != "opened" {
		t.Errorf("answer %s", again.raw)
	}
	r.want(r.send("POST", openPath(1), both, `{}`, "Idempotency-Key", "k"), http.StatusUnprocessableEntity)
	again = r.send("POST", openPath(1), both, `{"requestId":"p"}`)
	r.repeat(again, pending)
	if again.get("command", "outcome") == "pending" {
		t.Errorf("%s is still under way: %s", command, again.raw)
	}
	last := r.opensAt(1, both, `{"requestId":"fresh"}`)
	r.fresh(last)
	d.await(device.Opened)
	if n := d.openings(); n != 0 || r.requests(1) != 3 || strings.Count(r.log.String(), "none is sent again") != 1 {
		t.Errorf("%d more openings, %d commands", n, r.requests(1))
	}
}
